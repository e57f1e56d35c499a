"""Progress on the terminal, and what a run leaves for the eye: loss plot and preview sheets."""
from pathlib import Path

from tqdm import tqdm


class Bars:
    """A bar for each stage with rate and time left; the training's shows loss and held-out error (nRMSE, 0 = the teacher)."""

    def __init__(self, show=None):
        self.bar, self.stage, self.show = None, None, show

    def __call__(self, stage: str, done: int, total: int, picture=None, **facts):
        if stage != self.stage:
            self.close()
            self.stage, self.bar = stage, tqdm(total=total, desc=stage, initial=done)
        self.bar.update(done - self.bar.n)
        if facts:
            self.bar.set_postfix({name: f"{facts[name]:.4f}" for name in ("loss", "held_out", "best") if facts.get(name) is not None})
        if picture is not None and self.show:
            self.show(facts["iteration"], picture)

    def close(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = self.stage = None


def plot_loss(log: list[dict], path: Path) -> None:
    """Training loss and held-out error over optimiser steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    steps = [line["iteration"] for line in log]
    axis.plot(steps, [line["held_out"] for line in log], "o-", label="held out (nRMSE)")
    axis.set(xlabel="optimiser steps", ylabel="error to the teacher (0 = the same picture)", ylim=(0, None))
    axis.axhline(log[0]["held_out"], color="grey", linestyle=":", label="plain model")
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
