"""`consistency-lens serve`: a page at which any text is read by a lens, on this machine."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until it is interrupted; says where. Returns the exit code."""
    from .command import run_command
    from .parser import parse_arguments

    def work(console: "Console") -> None:
        from ..evaluation.saved_lens import load_lens
        from ..optional_packages import require
        from ..report.live import make_app
        from ..report.serve_arguments import ServeArguments

        (args,) = parse_arguments((ServeArguments,), argv, "serve", first="lens")
        uvicorn = require("uvicorn", "serve", "serve")
        check_free(args.host, args.port)
        lens = load_lens(args, args.verify_base).eval()
        app = make_app(
            lens,
            args.lens,
            max_tokens=args.max_tokens,
            queue=args.queue,
            seconds=args.seconds,
            ablation=args.ablation,
            hosts=args.known_hosts,
        )
        console.print(f"http://{args.host}:{args.port} (Ctrl-C ends it)", markup=False, highlight=False)
        uvicorn.run(app, host=args.host, port=args.port, log_level="warning", limit_concurrency=256)

    return run_command(work)


def check_free(host: str, port: int) -> None:
    """Checks that a server can listen at a place, before a lens is loaded for it.

    Raises:
        ValueError: if not, saying why.
    """
    import socket

    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as place:
            # a server that ended a moment ago does not hold its port
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind(address)
    except OSError as error:
        raise ValueError(
            f"serve: cannot listen at {host}:{port} ({error.strerror or error}); pass another --port or --host"
        ) from error
