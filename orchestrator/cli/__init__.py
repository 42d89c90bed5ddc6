"""The command line: thin; parse, call, print, exit code. Results go to stdout, logs and errors to stderr."""

from __future__ import annotations

import sys

from orchestrator.errors import DefinitionError, OrchestratorError


def main() -> None:
    """Run the command line and exit with its code. Errors of ours are one line each, never a traceback."""
    import redis
    import typer

    from orchestrator.cli.commands import app

    try:
        code = app(standalone_mode=False, prog_name="orchestrator")
    except DefinitionError as exc:
        print(exc, file=sys.stderr)
        sys.exit(1)
    except OrchestratorError as exc:
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(1)
    except redis.RedisError as exc:
        print(f"error: the ledger failed: {str(exc).splitlines()[0]}", file=sys.stderr)
        sys.exit(1)
    except typer.TyperException as exc:
        # A usage error; typer keeps its own copy of click and names only the root of its errors.
        print(f"error: {getattr(exc, 'format_message', exc.__str__)()}; see `orchestrator --help`", file=sys.stderr)
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read us has enough (`| head`); Python would complain once more at exit.
        sys.stderr.close()
        sys.exit(0)
    sys.exit(code if isinstance(code, int) else 0)
