"""Turns what the daemon knows of models into messages of the API."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.timestamp_pb2 import Timestamp

from lmd.daemon.pull_job import PullStatus, State
from lmd.daemon.quantizer import WorkProgress
from lmd.daemon.quantizing import Compared
from lmd.daemon.summaries import ListedModel, Summary
from lmd.daemon.versions import ListedVersion, how_and_detail
from lmd.registry.errors import ModelfileProblem
from lmd.registry.inspect import ModelFacts
from lmd.registry.modelfile import Modelfile
from lmd.registry.parameters import ParameterValue
from lmd.registry.pull import PullEvent
from lmd.v1 import model_pb2, model_service_pb2


def timestamp(seconds: float) -> Timestamp:
    """Return a time given in seconds since the epoch."""
    message = Timestamp()
    message.FromNanoseconds(round(seconds * 1e9))
    return message


def model_message(listed: ListedModel, own_bytes: int = 0) -> model_pb2.Model:
    """Return the headline facts of a name; *own_bytes* are what only it needs."""
    tag, summary = listed.tag, listed.summary
    return model_pb2.Model(
        name=tag.name,
        digest=str(tag.manifest),
        size_bytes=summary.size_bytes,
        own_bytes=own_bytes,
        modified_time=timestamp(tag.modified_at),
        details=_details(summary),
        capabilities=summary.capabilities,
    )


def work_message(progress: WorkProgress) -> model_service_pb2.PullProgress:
    """Return how far a quantization or a measurement is."""
    done = progress.completed_bytes >= progress.total_bytes
    return model_service_pb2.PullProgress(
        filename=progress.label,
        completed_bytes=progress.completed_bytes,
        total_bytes=progress.total_bytes,
        state=model_service_pb2.PullProgress.STATE_DONE if done else model_service_pb2.PullProgress.STATE_DOWNLOADING,
    )


def measurement_message(compared: Compared) -> model_service_pb2.Measurement:
    """Return one side of a comparison."""
    measured = compared.measured
    return model_service_pb2.Measurement(
        name=compared.name,
        quantization=compared.quantization,
        size_bytes=compared.size_bytes,
        perplexity=measured.perplexity,
        scored_tokens=measured.tokens,
        prompt_tokens_per_second=measured.prompt_tokens_per_s,
        answer_tokens_per_second=measured.answer_tokens_per_s,
    )


def info_message(facts: ModelFacts, own_bytes: int = 0) -> model_pb2.ModelInfo:
    """Return everything about a model."""
    model = model_pb2.Model(
        name=facts.name,
        digest=str(facts.digest),
        size_bytes=facts.size_bytes,
        own_bytes=own_bytes,
        modified_time=timestamp(facts.modified_at),
        details=_details(facts),
        capabilities=facts.capabilities,
    )
    origin = model_pb2.Origin(
        ref=facts.origin.ref,
        commit=facts.origin.commit,
        pulled_time=timestamp(facts.pulled_at),
        quantize=facts.origin.quantize,
        quantized_from=facts.origin.quantized_from,
        imatrix=facts.origin.imatrix,
    )
    files = [
        model_pb2.ModelFile(
            role=f.role,
            filename=f.filename,
            digest=str(f.digest),
            size_bytes=f.size_bytes,
            scale=f.scale if f.role == "adapter" else 0,
        )
        for f in facts.files
    ]
    return model_pb2.ModelInfo(
        model=model,
        template=facts.template,
        system=facts.system,
        parameters=parameters_message(facts.parameters),
        messages=[model_pb2.Message(role=m.role, content=m.content) for m in facts.messages],
        licenses=facts.licenses,
        origin=origin,
        files=files,
        modelfile=facts.modelfile,
        metadata=facts.metadata,
        requires=facts.requires,
    )


def check_message(recipe: Modelfile) -> model_service_pb2.CheckModelfileResponse:
    """Return what a Modelfile refers to, and what of it has no effect."""
    message = model_service_pb2.CheckModelfileResponse(
        draft=[source.value for source in recipe.drafts or ()],
        attached=[source.value for source in recipe.file_sources],
        warnings=[problem_message(warning) for warning in recipe.warnings],
    )
    # The name of the field is a word of Python.
    getattr(message, "from").extend(source.value for source in recipe.from_)
    return message


def problem_message(problem: ModelfileProblem) -> model_service_pb2.ModelfileProblem:
    """Return what is the matter with a line of a Modelfile."""
    return model_service_pb2.ModelfileProblem(line=problem.line, column=problem.column, message=problem.message)


def parameters_message(parameters: Mapping[str, ParameterValue]) -> model_pb2.Parameters:
    """Return the settings that are set; the registry's names are the fields'."""
    message = model_pb2.Parameters()
    for name, value in parameters.items():
        if isinstance(value, tuple):
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    return message


def version_message(listed: ListedVersion) -> model_service_pb2.Version:
    """Return a version of a name."""
    how, detail = how_and_detail(listed.version.note)
    return model_service_pb2.Version(
        number=listed.version.number,
        digest=str(listed.version.manifest),
        time=timestamp(listed.version.changed_at),
        how=how,
        detail=detail,
        change=listed.change,
        state=model_service_pb2.Version.State.Value(f"STATE_{listed.state.name}"),
        spared_until_time=None if listed.spared_until is None else timestamp(listed.spared_until),
    )


def progress_message(event: PullEvent) -> model_service_pb2.PullProgress:
    """Return a step of a pull."""
    return model_service_pb2.PullProgress(
        digest=event.digest,
        filename=event.filename,
        completed_bytes=event.completed_bytes,
        total_bytes=event.total_bytes,
        state=model_service_pb2.PullProgress.State.Value(f"STATE_{event.state.name}"),
        resumed_bytes=event.resumed_bytes,
        detail=event.detail,
    )


def pull_message(status: PullStatus) -> model_service_pb2.Pull:
    """Return a pull of the daemon."""
    return model_service_pb2.Pull(
        pull_id=status.pull_id,
        ref=status.ref,
        name=status.name,
        state=_PULL_STATES[status.state],
        completed_bytes=status.completed_bytes,
        total_bytes=status.total_bytes,
        start_time=timestamp(status.started_at),
        detached=status.detached,
        watchers=status.watchers,
        error_message=status.error_message,
    )


_PULL_STATES = {
    State.ACTIVE: model_service_pb2.Pull.STATE_ACTIVE,
    State.SUCCEEDED: model_service_pb2.Pull.STATE_SUCCEEDED,
    State.FAILED: model_service_pb2.Pull.STATE_FAILED,
    State.CANCELLED: model_service_pb2.Pull.STATE_CANCELLED,
}


def _details(facts: ModelFacts | Summary) -> model_pb2.ModelDetails:
    return model_pb2.ModelDetails(
        architecture=facts.architecture,
        parameter_count=facts.parameter_count,
        quantization=facts.quantization,
        context_length=facts.context_length,
        embedding_length=facts.embedding_length,
        block_count=facts.block_count,
        vocabulary_size=facts.vocabulary_size,
        title=facts.title,
    )
