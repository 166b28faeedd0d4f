"""What each verb of `data-engine` does: a few lines each over the parts that do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from data_engine import settings
from data_engine.engine import Engine
from sam_train import config


class Call(NamedTuple):
    """What was typed after the verb."""

    overrides: list[str]
    config_dir: str | None


def init(call: Call) -> None:
    """a new engine: root=DIR images=PATH checkpoint=MODEL plan=NAME"""
    from data_engine.founding import found

    with closing(found(call.overrides, call.config_dir)) as engine:
        store = engine.store
        print(
            f"{engine.root}: {store.num_images(held_out=False)} images to label, "
            f"{store.num_images(held_out=True)} held out, {len(engine.steps)} steps. "
            f"data-engine round root={engine.root} runs the first"
        )


def register(call: Call) -> None:
    """more images: root=DIR images=PATH"""
    from data_engine.founding import add_more_images

    with _engine(call) as engine:
        if engine.settings["images"] is None:
            raise ValueError("no value for images; say images=... (a folder, a glob or shards)")
        print(add_more_images(engine))


def status(call: Call) -> None:
    """where the rounds stand, and what they wait for"""
    from data_engine.status import describe

    with _engine(call) as engine:
        print(describe(engine))


def round_(call: Call) -> None:
    """the next step of the plan, or on with the one under way: annotator=simulated does the people's part; all=true: all steps"""
    from data_engine.rounds import run_round
    from data_engine.status import describe, summary

    with _engine(call) as engine:
        while True:
            progress = run_round(engine)
            if progress.round is None:
                print("The plan has no further step.")
            elif progress.waits_for:
                number = progress.round.number
                print(f"{describe(engine)}\nRound {number} waits for {progress.waits_for}.")
            else:
                print(summary(engine, progress.round))
                if engine.settings["all"]:
                    continue
            return


def retrain(call: Call) -> None:
    """a training on all masks so far, beside the plan's; promote_model=ID takes a model that was made before"""
    from data_engine.rounds import promote, retrain_now
    from data_engine.status import describe_model

    with _engine(call) as engine:
        if (name := engine.settings["promote_model"]) is not None:
            print(f"The next round works with {promote(engine, str(name)).id}.")
        else:
            model = retrain_now(engine)
            print(describe_model(model))


def generate(call: Call) -> None:
    """a worker of the automatic round under way: worker=I num_workers=N"""
    from data_engine.rounds import generate_now

    with _engine(call) as engine:
        print(generate_now(engine))


def annotate(call: Call) -> None:
    """does the open tasks of the round under way: annotator=simulated"""
    from data_engine.annotation import simulate

    with _engine(call) as engine:
        if engine.settings.get("annotator") is None:
            raise ValueError("the page for people is not built yet; say annotator=simulated")
        round_ = engine.current_round()
        if round_ is None or round_.state != "annotating":
            raise ValueError(f"no round waits for annotators: data-engine round root={engine.root}")
        print(simulate(engine, round_, round_.stage))


def audit(call: Call) -> None:
    """second looks at an automatic round's masks: of_round=N annotator=simulated; tune=true proposes thresholds"""
    from data_engine.second_looks import run_audit, run_tuning

    with _engine(call) as engine:
        print(run_tuning(engine) if engine.settings["tune"] else run_audit(engine))


def report(call: Call) -> None:
    """a round's report, written anew: of_round=N"""
    from data_engine.report import write_report

    with _engine(call) as engine:
        number, last = engine.settings["of_round"], engine.current_round()
        if number is None and last is None:
            raise ValueError(f"{engine.root} has no round yet")
        chosen = int(number) if number is not None or last is None else last.number
        node = config.instantiate(engine.settings["report"])
        print(f"See {write_report(engine.store, engine.root, chosen, node)}")


def lineage(call: Call) -> None:
    """names all that came from an image: image=KEY"""
    from data_engine.image_traces import traces

    with _engine(call) as engine:
        if engine.settings["image"] is None:
            raise ValueError("no value for image; say image=KEY")
        print(traces(engine, str(engine.settings["image"])))


def remove(call: Call) -> None:
    """takes an image down, with all that came from it: image=KEY reason=TEXT"""
    from data_engine.removal import remove as take_down

    with _engine(call) as engine:
        said = engine.settings
        if said["image"] is None or said["reason"] is None:
            raise ValueError("say image=KEY and reason=TEXT")
        print(
            take_down(engine, str(said["image"]), reason=str(said["reason"]), who=str(said["who"]))
        )


def backup(call: Call) -> None:
    """the store as one file: out=FILE"""
    from data_engine.mask_store.backup import back_up

    with _engine(call) as engine:
        if (out := engine.settings["out"]) is None:
            raise ValueError("no value for out; say out=FILE")
        back_up(engine.store, Path(str(out)))
        print(f"See {out}: it is a store itself, store.url={out} opens it")


def publish(call: Call) -> None:
    """copies shards, models, reports and the store to a folder or object storage: out=s3://BUCKET/FOLDER"""
    from data_engine.publish import publish as bring_up_to_date

    with _engine(call) as engine:
        if (out := engine.settings["out"]) is None:
            raise ValueError(
                "no value for out; say out=DIR or a URL that fsspec knows, s3://BUCKET/FOLDER"
            )
        print(bring_up_to_date(engine, str(out)))


@contextmanager
def _engine(call: Call) -> Iterator[Engine]:
    named = [one for one in call.overrides if one.startswith("root=")]
    root = config.plain(settings.composed(named), resolve=False)["root"]
    if root in ("???", None):
        raise ValueError("no value for root; say root=DIR")
    engine = Engine.open(Path(str(root)), call.overrides, config_dir=call.config_dir)
    try:
        yield engine
    finally:
        engine.close()


VERBS: dict[str, Callable[[Call], None]] = {
    "init": init,
    "register": register,
    "status": status,
    "round": round_,
    "retrain": retrain,
    "generate": generate,
    "annotate": annotate,
    "audit": audit,
    "report": report,
    "lineage": lineage,
    "remove": remove,
    "backup": backup,
    "publish": publish,
}
