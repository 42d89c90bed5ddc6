"""The same in Python: calling tasks inside a workflow draws the graph, and nothing runs yet."""

from orchestrator import on, task, workflow


@task
def check_stock(article, quantity):
    """Return whether there is enough of an article."""
    return quantity <= 500


@task
def confirm(customer, lines, in_stock):
    """Return what is written to the customer."""
    missing = [line["article"] for line, there in zip(lines, in_stock, strict=True) if not there]
    return f"Dear {customer}, we are out of {', '.join(missing)}." if missing else f"Thank you, {customer}!"


@task
def check_line(line):
    """Return whether one line of an order can be delivered."""
    return check_stock(line["article"], line["quantity"])  # outside a workflow a task is a plain function


@task
def count(article):
    """Return how many of an article there are."""
    return {"bolts": 500, "nuts": 80}[article]


@workflow(on=[on.schedule(cron="0 6 * * MON-FRI", timezone="Europe/Paris", catchup="latest")])
def stocktaking(event):
    """Count what there is, at six on working days; after a downtime once."""
    return count.map(["bolts", "nuts"])


@workflow(on=[on.event({"type": ["shop.order.placed"], "data": {"amount": [{"numeric": [">", 100]}]}})])
def large_orders(event):
    """Answer orders of more than 100."""
    lines = event.data["lines"]
    return confirm(event.data["customer"], lines, check_line.map(lines))
