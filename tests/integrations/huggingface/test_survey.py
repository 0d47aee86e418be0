"""Every causal language model type of the installed transformers, tiny, in every way of use: with pool ranks it is
what it is without, or it is refused when it is loaded."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fapool_plugin.integrations.huggingface.pieces import SURVEYED
from tests.models import workers
from tests.survey import AGREED, PHASES, TYPES, Found, agreed_in_blocks, lines, survey
from tests.survey_configs import NOT_BUILT, VARIANTS

pytestmark = [pytest.mark.full, pytest.mark.processes, pytest.mark.usefixtures("one_thread_each")]


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> Iterator[dict[str, Found]]:
    """What the tests of this run have found, by type; shown when the last of them has ended."""
    collected: dict[str, Found] = {}
    yield collected
    plugins = request.config.pluginmanager
    with plugins.getplugin("capturemanager").global_and_fixture_disabled():
        for line in ("", *lines(collected.values())):
            plugins.getplugin("terminalreporter").write_line(line)


@pytest.mark.parametrize("name", [*TYPES, *VARIANTS])
def test_type(name: str, found: dict[str, Found]) -> None:
    before = workers()
    found[name] = survey(name)
    assert not found[name].wrong, "\n".join(found[name].wrong)
    assert not workers() - before, "a pool rank is left behind"


@pytest.mark.parametrize("name", [*TYPES, *VARIANTS])
def test_type_with_keys_on_the_pool(name: str) -> None:
    before = workers()
    wrong = survey(name, "pool").wrong
    assert not wrong, "\n".join(wrong)
    assert not workers() - before, "a pool rank is left behind"


def test_most_types_are_pooled(found: dict[str, Found]) -> None:
    """Of all types; where only some were asked for, there is nothing to count."""
    types = [found[name] for name in TYPES if name in found]
    if len(types) < len(TYPES):
        pytest.skip(f"{len(types)} of {len(TYPES)} types were surveyed")
    late = {each.name for each in types if each.verdict == "refused late"}
    assert not late, f"refused late: {sorted(late)}"
    equal = {each.name for each in types if each.verdict in AGREED}
    assert len(equal) >= 130, f"{len(equal)} types are pooled and equal"
    assert {each.name for each in types if each.verdict == "not built"} == set(NOT_BUILT)
    agreed = set.intersection(*(agreed_in_blocks(types, phase) for phase in PHASES))
    assert agreed >= SURVEYED, f"cut where no trial shows it, and not equal here: {sorted(SURVEYED - agreed)}"
