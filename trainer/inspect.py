"""Print what a table holds: steps, solver, sigmas, training, and the size of Δ by layer and row."""
from pathlib import Path

from mteo.embeddings import load_embeddings


def add_flags(parser) -> None:
    parser.add_argument("table", help="a .safetensors file of MTEO")


def run(options) -> None:
    print("\n".join(describe(Path(options.table))))


def describe(path: Path) -> list[str]:
    """Lines of text."""
    embeddings = load_embeddings(path)
    numbers = lambda values: " ".join(f"{value:.4g}" for value in values)
    lines = [f"{path.name}: {path.stat().st_size:,} bytes, space {embeddings.space}, model {embeddings.model.get('family', '?')}"]
    for steps, table in sorted(embeddings.tables.items()):
        some = f", image to image at denoise {table.denoise:g}" if table.denoise < 1 else ""
        some += f", guided in {numbers(table.guided) or 'no step'} only" if table.alone else ""
        rows = ", rows learned" if table.learned is not None else ""
        lines.append(f"{steps} steps of {table.solver}{rows}; sigmas {numbers(table.sigmas)}; cfg {numbers(table.guidance)}{some}")
        width = max(map(len, table.offsets))
        for number, cfg in enumerate(table.guidance):
            log = [line for line in table.record.get("log", []) if line["cfg"] == cfg]
            if log:
                lines.append(f"  cfg {cfg:g}: held-out error {log[0]['held_out']:.4f} -> {log[-1]['best']:.4f} in {log[-1]['iteration']} optimiser steps")
            lines.append(f"  cfg {cfg:g}: calls told {numbers(table.tableau_at(cfg).sigmas)}")
            lines.append(f"  {'root mean square of Δ, row:':{width}} " + " ".join(f"{row:>8}" for row in range(len(table.tableau.row_sigmas))))
            for site, rows in table.offsets.items():
                lines.append(f"  {site:{width}} " + " ".join(f"{float(value):8.4f}" for value in rows[number].square().mean(1).sqrt()))
    return lines
