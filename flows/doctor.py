"""Look at every record that is kept, with what was found on the record."""

from __future__ import annotations

from prefect import flow
from prefect.runtime import flow_run

from sekha.doctor import Diagnosis, DoctorRequest, DoctorSteps, diagnose
from tasks.doctoring import (
    delete_faulty,
    examine_index,
    gather_faulty,
    name_indexes,
    publish_diagnosis,
    survey_store,
    write_anew,
)
from tasks.embedding import EMBEDDING
from tasks.receipts import shown_progress
from tasks.resources import opened
from tasks.results import RESULT
from tasks.whole import given_whole

__all__ = ["STEPS", "doctor"]

STEPS = given_whole(
    DoctorSteps(
        survey=survey_store,
        examine=examine_index,
        gather=gather_faulty,
        embedding=EMBEDDING,
        write=write_anew,
        delete=delete_faulty,
        name=name_indexes,
    )
)
LOOK = DoctorRequest()


def run_name() -> str:
    """What is looked at: `all`, `documents, notes`."""
    request: DoctorRequest = flow_run.parameters["request"]
    return ", ".join(request.collections) or "all"


@flow(name="doctor", flow_run_name=run_name, persist_result=True, result_serializer=RESULT)
async def doctor(request: DoctorRequest = LOOK, config: str | None = None) -> Diagnosis:
    """Say what is wrong with what is kept, and repair what is asked for."""
    async with opened(config), shown_progress("records are embedded anew") as progress:
        found = await diagnose(request, STEPS, progress=lambda _, done, total: progress(done, total))
        await publish_diagnosis(found)
        return found
