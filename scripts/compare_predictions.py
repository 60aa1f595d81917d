"""Print some questions with the answers of two runs, and how many answers of each match exactly.

python scripts/compare_predictions.py BEFORE/predictions.jsonl AFTER/predictions.jsonl --show 3
"""

import argparse
import json
from pathlib import Path


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a predictions.jsonl."""
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    if not all(isinstance(row, dict) and {"input", "output", "prediction"} <= row.keys() for row in rows):
        raise ValueError(f"{path}: expected rows with input, output and prediction")
    return rows


def main() -> None:
    """Compare two prediction files for the same rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--show", type=int, default=3, help="rows to print")
    args = parser.parse_args()
    try:
        before, after = read(args.before), read(args.after)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if [row["input"] for row in before] != [row["input"] for row in after]:
        parser.error("the two files have different questions")
    for old, new in list(zip(before, after, strict=True))[: args.show]:
        print(f"\n{old['input']}")
        print(f"  before:    {' '.join(old['prediction'].split())}")
        print(f"  after:     {' '.join(new['prediction'].split())}")
        print(f"  expected:  {old['output']}")
    for name, rows in (("before", before), ("after", after)):
        right = sum(row["prediction"].strip() == row["output"].strip() for row in rows)
        print(f"{'' if name == 'after' else chr(10)}exact answers {name}: {right} of {len(rows)}")


if __name__ == "__main__":
    main()
