"""Progress on the terminal, and what a run leaves for the eye: loss plot and preview sheets."""
from pathlib import Path

from tqdm import tqdm


class Bars:
    """A bar for each stage with rate and time left; the training's shows loss and held-out error (nRMSE, 0 = the teacher)."""

    def __init__(self, show=None):
        self.bar, self.stage, self.show = None, None, show

    def __call__(self, stage: str, done: int, total: int, part=(0, 1), picture=None, **facts):
        if part[1] > 1:
            stage = f"{stage} ({part[0] + 1} of {part[1]} cfg values)"
        if stage != self.stage:
            self.close()
            self.stage, self.bar = stage, tqdm(total=total, desc=stage, initial=done)
        self.bar.update(done - self.bar.n)
        if facts:
            self.bar.set_postfix({name: f"{facts[name]:.4f}" for name in ("loss", "held_out", "mean", "unlike", "best") if facts.get(name) is not None})
        if picture is not None and self.show:
            self.show(part[0], facts["iteration"], picture)

    def close(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = self.stage = None


def plot_loss(log: list[dict], path: Path) -> None:
    """Held-out error over optimiser steps, and how unlike the teacher's pictures the network finds the student's, for each cfg value."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [
        (name, label)
        for name, label in (("held_out", "held-out error (0 = the teacher's picture)"), ("unlike", "unlike to the network (0 = alike)"))
        if any(line.get(name) is not None for line in log)
    ]
    figure, axes = plt.subplots(1, len(shown), figsize=(5 * len(shown), 4), layout="constrained", squeeze=False)
    for axis, (name, label) in zip(axes[0], shown, strict=True):
        for number, cfg in enumerate(dict.fromkeys(line["cfg"] for line in log)):
            own = [line for line in log if line["cfg"] == cfg and line.get(name) is not None]
            if own:
                axis.plot([line["iteration"] for line in own], [line[name] for line in own], "o-", color=f"C{number}", label=f"cfg {cfg:g}")
        axis.set(xlabel="optimiser steps", ylabel=label, ylim=(0, None))
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
