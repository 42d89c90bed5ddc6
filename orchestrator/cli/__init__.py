"""The command line: thin; parse, call, print, exit code. Results go to stdout, logs and errors to stderr."""

from __future__ import annotations

import sys

from orchestrator.errors import DefinitionError, OrchestratorError


def main() -> None:
    """Run the command line and exit with its code. Errors of ours are one line each, never a traceback."""
    import click
    import redis

    from orchestrator.cli.commands import app

    try:
        code = app(standalone_mode=False)
    except DefinitionError as exc:
        print(exc, file=sys.stderr)
        sys.exit(1)
    except OrchestratorError as exc:
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(1)
    except redis.RedisError as exc:
        print(f"error: the ledger failed: {str(exc).splitlines()[0]}", file=sys.stderr)
        sys.exit(1)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read us has enough (`| head`); Python would complain once more at exit.
        sys.stderr.close()
        sys.exit(0)
    sys.exit(code if isinstance(code, int) else 0)
