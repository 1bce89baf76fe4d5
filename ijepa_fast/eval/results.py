"""Figures of several seeds, and the table that is printed of them."""

import math

# Student's t, 97.5 %, for 2 to 10 seeds; 1.96 and a little more for more of them.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_NAMES = {"accuracy": "accuracy", "r2": "R^2", "mean_absolute_error": "mean abs. error"}


def interval(values):
    """The mean of a figure over seeds and half its 95 % confidence interval (Student's t); None for one seed."""
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return mean, None
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    t = _T[n - 2] if n - 2 < len(_T) else 2.262
    return mean, t * deviation / math.sqrt(n)


def over_seeds(runs):
    """[figures of each seed] -> {"<figure>": {"mean", "interval", "seeds"}, "chosen": [what each seed's sweep chose]}.

    A run is {"<figure>": number} with, beside the figures, what was chosen; see suite.measure and LinearHead.chosen.
    """
    out = {}
    for key in (key for key in _NAMES if key in runs[0]):
        values = [run[key] for run in runs]
        mean, half = interval(values)
        out[key] = {"mean": mean, "interval": half, "seeds": values}
    chosen = [{key: value for key, value in run.items() if key not in _NAMES} for run in runs]
    return out | ({"chosen": chosen} if any(chosen) else {})


def table(results):
    """Text of {task: {"task": kind, "probes": {name: over_seeds(...)}}}: a line a probe, its figures in columns."""
    lines = []
    for name, result in results.items():
        probes = result["probes"]
        figures = [key for key in _NAMES if key in next(iter(probes.values()))]
        title = f"{name} ({result['task']})"
        lines.append(f"{title:<36}" + "".join(f"{_NAMES[key]:>20}" for key in figures))
        for probe, values in probes.items():
            lines.append(f"  {probe:<34}" + "".join(f"{_show(values[key]):>20}" for key in figures))
    return "\n".join(lines)


def _show(figure):
    half = figure["interval"]
    return f"{figure['mean']:.4f}" + ("" if half is None else f" +- {half:.4f}")
