from __future__ import annotations

import pickle
from dataclasses import is_dataclass, replace

from pydantic import TypeAdapter

from sekha.calling import Attempt
from sekha.pricing import Usage


def test_values_are_equal_by_what_they_hold() -> None:
    assert Usage(input_tokens=3) == Usage(input_tokens=3)
    assert len({Usage(input_tokens=3), Usage(input_tokens=3), Usage(input_tokens=4)}) == 2


def test_a_value_is_changed_by_making_another() -> None:
    attempt = Attempt(provider_id="openai", model_id="gpt-5-mini", seconds=0.5)

    failed = replace(attempt, error="rate_limited")

    assert (attempt.error, failed.error, failed.seconds) == (None, "rate_limited", 0.5)


def test_a_value_goes_between_processes_and_through_json() -> None:
    usage = Usage(input_tokens=3, output_tokens=4, counted=True)
    written = TypeAdapter(Usage).dump_json(usage)

    assert is_dataclass(usage)
    assert pickle.loads(pickle.dumps(usage)) == usage
    assert TypeAdapter(Usage).validate_json(written) == usage
