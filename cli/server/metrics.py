"""What /metrics tells, in Prometheus' text format."""

from collections import Counter


class Metrics:
    """Counted on the event loop alone."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # by route and status
        self.prompt_tokens = self.generated_tokens = 0
        self.first_tokens, self.first_token_seconds = 0, 0.0

    def first_token(self, seconds: float) -> None:
        self.first_tokens += 1
        self.first_token_seconds += seconds

    def text(self, *, running: int, waiting: int) -> str:
        lines = ["# TYPE gpt_requests_total counter"]
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'gpt_requests_total{{path="{path}",status="{status}"}} {count}')
        for name, kind, value in (
            ("gpt_prompt_tokens_total", "counter", self.prompt_tokens),
            ("gpt_generated_tokens_total", "counter", self.generated_tokens),
            ("gpt_texts_running", "gauge", running),
            ("gpt_texts_waiting", "gauge", waiting),
        ):
            lines += [f"# TYPE {name} {kind}", f"{name} {value}"]
        lines += [
            "# TYPE gpt_first_token_seconds summary",
            f"gpt_first_token_seconds_sum {self.first_token_seconds}",
            f"gpt_first_token_seconds_count {self.first_tokens}",
        ]
        return "\n".join(lines) + "\n"
