"""`data-engine VERB ...`: the model-in-the-loop annotation rounds of SAM's data engine."""

import sys

MISTAKE = 2
PLANNED = {
    "init": "a new engine folder",
    "annotate": "the web annotator",
    "generate": "masks without a human",
    "retrain": "training on the accepted masks",
    "round": "a whole round",
    "audit": "second looks at a sample",
    "report": "figures of each round",
    "status": "where the rounds stand",
}


def main() -> int:
    """Says, for now, what each verb will do."""
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb in PLANNED:
        message = f"{verb} is not built yet. It will give: {PLANNED[verb]}"
    else:
        message = f"expected one of {', '.join(PLANNED)}; none of them is built yet"
    print(f"data-engine: {message}", file=sys.stderr)
    return MISTAKE
