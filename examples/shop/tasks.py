"""The functions that the steps call. They are plain functions: test them like any other."""

import csv
import time
from pathlib import Path


def read(path):
    """Return the rows of an invoice file."""
    with Path(path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    print(f"{len(rows)} rows in {path}")
    return rows


def price(row):
    """Return what one row comes to."""
    time.sleep(0.02)  # a little work, so that there is something to see
    return float(row["quantity"]) * float(row["unit_price"])


def count_articles(rows):
    """Return how many pieces of each article there are."""
    pieces = {}
    for row in rows:
        pieces[row["article"]] = pieces.get(row["article"], 0) + int(row["quantity"])
    return pieces


def report(file, amounts, articles):
    """Put both together."""
    return {"file": file, "rows": len(amounts), "total": round(sum(amounts), 2), "articles": articles}


def answer_return(article, quantity):
    """Return what is written to who returns something."""
    return f"Send us {quantity} {article}."


def tell(workflow, run, error):
    """Tell somebody; here it is only printed (`orchestrator runs logs`)."""
    print(f"run {run}: {error['message']}")
    return f"{workflow} failed: {error['type']}"
