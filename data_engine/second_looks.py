"""The audit of an automatic round from end to end: tasks out, reviews in, what they say."""

from __future__ import annotations

from data_engine.annotation import simulate
from data_engine.audit import STAGE, Audit, AuditResult, audit_result, audit_tasks, collect_reviews
from data_engine.audited_source import tune_thresholds
from data_engine.engine import Engine
from data_engine.records import Round
from data_engine.report import write_report
from data_engine.round_numbers import is_simulated
from data_engine.simulated_annotator import FIRST_NAME
from sam_train import cli_common, config
from sam_train.checkpoints.load import load_model
from sam_train.evaluation.threshold_tuning import Tuned


def run_audit(engine: Engine) -> str:
    """Hands an audit out, takes in what is done of it, and says what it shows so far.

    Raises:
        ValueError: there is no automatic round, or it has no mask.
    """
    round_ = automatic_round(engine)
    audit = config.instantiate(engine.settings["audit"])
    assert isinstance(audit, Audit)
    engine.desk.add_tasks(audit_tasks(engine.store, engine.root, round_.number, audit))
    if engine.settings.get("annotator") is not None:
        # Of a pair of people the tasks are theirs, and wait for them.
        pair = [name for name in audit.pair or () if is_simulated((name,))]
        simulate(engine, round_, STAGE, list(dict.fromkeys([*pair, FIRST_NAME])))
    collect_reviews(engine.store, round_.number)
    tasks = engine.store.tasks(round=round_.number, stage=STAGE)
    waiting = sum(task.state in ("open", "leased") for task in tasks)
    result = audit_result(engine.store, round_.number)
    settings = config.instantiate(engine.settings["report"])
    page = write_report(engine.store, engine.root, round_.number, settings)
    said = "nothing was audited yet" if result is None else _said(result)
    return f"round {round_.number}: {said}; {waiting} of {len(tasks)} tasks wait for annotators\nSee {page}"


def run_tuning(engine: Engine) -> Tuned:
    """Proposes thresholds of the automatic stage; nothing is changed."""
    round_ = automatic_round(engine)
    cli_common.prepare_host()
    device = cli_common.device(str(engine.settings["device"]))
    model = load_model(engine.path(engine.model_of(round_).path), device=device)
    tuning = config.instantiate(engine.settings["tuning"])
    out = engine.round_folder(round_.number) / "tuning.json"
    return tune_thresholds(engine.store, round_.number, model, tuning, out)


def automatic_round(engine: Engine) -> Round:
    """The automatic round that a call means: `of_round`, or the last one.

    Raises:
        ValueError: there is none, or another stage's.
    """
    rounds = [one for one in engine.store.rounds() if one.stage == "automatic"]
    number = engine.settings["of_round"]
    named = [one for one in rounds if number is None or one.number == int(number)]
    if not named:
        known = ", ".join(str(one.number) for one in rounds) or "none yet"
        raise ValueError(
            "an audit looks at the masks of an automatic round, and there is no such round"
            f"{'' if number is None else f' {number}'}; automatic rounds: {known}"
        )
    return named[-1]


def _said(result: AuditResult) -> str:
    who = "simulated: " if is_simulated(result.annotators) else ""
    return (
        f"{who}{result.num_masks} masks of {result.num_images} images, mean IoU {result.mean_iou:.3f}, "
        f"{result.share_over_90:.1%} over 0.90, {result.share_over_75:.1%} over 0.75"
    )
