"""Arguments of `consistency-lens serve`."""

from dataclasses import dataclass, field

from ..evaluation.saved_lens import ReadingArguments

LOOPBACK = ("127.0.0.1", "localhost")


@dataclass
class ServeArguments(ReadingArguments):
    """Which lens is served, where, and what a text may cost."""

    host: str = field(
        default="127.0.0.1", metadata={"help": "Address to listen at; by default this machine alone can ask."}
    )
    port: int = field(default=8765, metadata={"help": "Port to listen at."})
    hosts: list[str] = field(
        default_factory=list,
        metadata={"help": "Names that others reach this machine by, where it listens to more than itself."},
    )
    max_tokens: int = field(default=256, metadata={"help": "Tokens of a text."})
    queue: int = field(default=16, metadata={"help": "Texts that are read or wait; more are told to come back (429)."})
    seconds: float = field(default=60.0, metadata={"help": "After so long a text is given up (503)."})
    ablation: bool = field(
        default=True, metadata={"help": "Shade the words of explanations by what is lost without each."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_tokens", "queue", "seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0 < self.port < 65536:
            raise ValueError(f"port must lie in 1..65535, got {self.port}")

    @property
    def known_hosts(self) -> tuple[str, ...]:
        """Names that requests may be addressed to."""
        return (*LOOPBACK, self.host, *self.hosts)
