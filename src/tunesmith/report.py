"""loss.png and report.md, made from events.jsonl and the manifest alone."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

from tunesmith.display import short_bytes, short_number
from tunesmith.run_folder import RunFolder, read_events, write_text


def write_report(folder: RunFolder) -> None:
    """Write both files into the run's folder."""
    events = read_events(folder.events)
    steps = [event for event in events if event["event"] == "step"]
    evals = [event for event in events if event["event"] == "eval"]
    if steps:
        _picture(steps, evals, folder.path / "loss.png", folder.read_manifest())
    foreseen = (folder.read_manifest().get("foreseen") or {}).get("peaks", {})
    measured: dict[str, Any] = next((event for event in reversed(events) if event["event"] == "memory"), {})
    phases = [name for name in foreseen if name in measured]
    if phases:
        _memory_picture(phases, foreseen, measured, folder.path / "memory.png")
    write_text(folder.path / "report.md", _text(folder, steps, evals, folder.read_manifest()))


def _picture(steps: list[dict[str, Any]], evals: list[dict[str, Any]], file: Path, manifest: dict[str, Any]) -> None:
    """The loss over the steps, and beside it each metric that the objective shows."""
    from matplotlib.figure import Figure

    names = ["loss", *(name for name in manifest.get("shows", []) if any(name in event for event in steps))]
    figure = Figure(figsize=(8 if len(names) == 1 else 5.5 * len(names), 4.5), layout="constrained")
    for number, name in enumerate(names, start=1):
        axes = figure.add_subplot(1, len(names), number)
        trained, held_out = ([event for event in events if name in event] for events in (steps, evals))
        at, values = [event["step"] for event in trained], [event[name] for event in trained]
        axes.plot(at, values, color="#9ecae1", linewidth=1, label=f"training {name}")
        axes.plot(at, _smooth(values), color="#2171b5", linewidth=2, label="smoothed")
        if held_out:
            line = "o-" if len(held_out) > 2 else "o"  # two points: a line would tell of what was not measured
            held = [event[name] for event in held_out]
            axes.plot([event["step"] for event in held_out], held, line, color="#d94801", label=f"held-out {name}")
        axes.set_xlabel("step")
        axes.set_ylabel(f"loss ({manifest.get('loss_unit', 'nats per target token')})" if name == "loss" else name)
        axes.grid(alpha=0.3)
        axes.legend()
    aside = file.with_name(".loss.writing.png")
    figure.savefig(aside, dpi=120)
    aside.replace(file)


def _memory_picture(phases: list[str], foreseen: dict[str, int], measured: dict[str, Any], file: Path) -> None:
    """Of each phase of a step the most that was foreseen, and what the largest batch took."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    largest = max(max(foreseen[name], measured[name]) for name in phases)
    size, unit = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")
    at = range(len(phases))
    bars = (("foreseen", foreseen, "#9ecae1", -0.2), ("measured", measured, "#2171b5", 0.2))
    for label, numbers, colour, shift in bars:
        drawn = axes.bar(
            [x + shift for x in at], [numbers[name] / size for name in phases], 0.38, label=label, color=colour
        )
        axes.bar_label(drawn, fmt="%.3g", padding=2, fontsize=8)
    axes.set_xticks(at, phases)
    axes.set_ylabel(f"tensors at most ({unit})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    aside = file.with_name(".memory.writing.png")
    figure.savefig(aside, dpi=120)
    aside.replace(file)


def _smooth(values: list[float]) -> list[float]:
    """Exponential average over about a twentieth of the run, corrected for its start."""
    keep = 1 - 1 / max(2.0, len(values) / 20)
    smoothed, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


def _text(folder: RunFolder, steps: list[dict[str, Any]], evals: list[dict[str, Any]], manifest: dict[str, Any]) -> str:
    lines = [f"# {folder.path.name}", ""]
    for name, text in manifest.get("header", []):
        lines.append(f"- **{name}**: {text}" if name else f"  {text}")  # without a name it goes on with the line above
    if steps:
        speed = short_number(median(event["tokens_per_s"] for event in steps))
        lines.append(f"- **steps**: {steps[-1]['step']}, at {speed} tokens/s (median)")
        for name in ["loss", *manifest.get("shows", [])]:
            found = [event[name] for event in steps if name in event]
            lines += [f"- **training {name}**: {found[0]:.4f} → {found[-1]:.4f}"] if found else []
        lines.append(f"- **memory**: {short_bytes(max(event['memory_bytes'] for event in steps))} at most")
    if evals:
        first, last = evals[0], evals[-1]
        for name in ["loss", *(name for name in manifest.get("shows", []) if name in first and name in last)]:
            lines.append(
                f"- **held-out {name}**: {first[name]:.4f} at step {first['step']}, {last[name]:.4f} at step {last['step']}"
            )
    else:
        lines.append("- **held-out loss**: not measured: no sample was held out (data.eval_path, data.eval_fraction)")
    if steps:
        lines += ["", "![loss over the steps](loss.png)"]
    if (folder.path / "memory.png").exists():
        lines += ["", "![memory that was foreseen, and that was measured](memory.png)"]
    ended = folder.has_ended()
    talk = f"The model is in `model/`. Talk to it: `tunesmith chat {folder.path}`"
    go_on = f"The run has not ended. Go on with it: `tunesmith train --resume {folder.path}`"
    lines += ["", talk if ended else go_on, ""]
    return "\n".join(lines)
