"""The text of `hooked-vlm list`: suites, experiments, models, and what other packages add."""

from collections.abc import Iterator

from hooked_vlm import zoo
from hooked_vlm.experiments import registry
from hooked_vlm.stimuli import settings


def listing() -> str:
    """Returns the lists as text; extensions that cannot be used are listed with the reason."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield "suites"
    for name, members in registry.SUITES.items():
        yield f"  {name:<18} {', '.join(members)}"
    yield "experiments"
    for name, experiment in registry.EXPERIMENTS.items():
        yield f"  {experiment.id:<3} {name:<22} paper, {experiment.section}: {experiment.title}"
        yield f"      {experiment.claim}"
    own, broken = registry.EXTENSIONS.every()
    own_settings, broken_settings = settings.EXTENSIONS.every()
    if own:
        yield "experiments of other packages"
    for one in own:
        yield f"  {one.id:<3} {one.name:<22} {one.origin}, {one.section}: {one.title}"
        yield f"      {one.claim}"
    if own_settings:
        yield "settings of other packages"
    for setting in own_settings:
        yield f"  {setting.name:<26} {setting.origin}"
    if broken or broken_settings:
        yield "not usable"
    for found in (*broken, *broken_settings):
        yield f"  {found.name:<26} {found.reason}"
    yield "shipped models"
    for name in zoo.available():
        yield f"  {name}"
