"""A picture of a calibration: predicted against measured time of every measurement."""

from pathlib import Path

from matplotlib.figure import Figure

from megatron_keye.plan.timing import PS_PER_S, Coefficients, Work
from megatron_keye.train.calibration import Calibration


def plot(calibration: Calibration, path: Path) -> None:
    """Draw it to `path`, in the format that its suffix names."""
    figure = Figure(figsize=(6, 6))
    axes = figure.subplots()
    least, greatest = float("inf"), 0.0
    for name, part in calibration.parts:
        coefficients = Coefficients(**part.coefficients.model_dump())
        measured = [seconds for *_, seconds in part.measurements]
        predicted = [coefficients.time_ps(Work(*work)) / PS_PER_S for *work, _ in part.measurements]
        axes.loglog(measured, predicted, ".", label=f"{name}, 95 % within {part.error_p95:.1%}")
        least, greatest = min([least, *measured]), max([greatest, *measured])
    axes.loglog([least, greatest], [least, greatest], color="grey", linewidth=1)
    axes.set(xlabel="measured s", ylabel="predicted s", title=f"{calibration.machine.device}, {calibration.date}")
    axes.legend()
    figure.savefig(path, dpi=150)
