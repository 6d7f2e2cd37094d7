"""Fail where something runs on another GPU than the one that was asked for. `python -m tests.gpu_path.second_device`"""

import threading
from typing import Any

import torch

from tests import gpu_path
from tests.gpu_path import lengths


def main() -> None:
    gpu = gpu_path.install(90)
    gpu.tensors_on = 1
    seen: dict[str, set[int]] = {}
    lengths.do_not_compile(lambda name, key: seen.setdefault(name, set()).add(torch.cuda.current_device()))
    # The current device is another: who has tensors on a second GPU need not say so twice.
    for call in (lengths.dense, lengths.packed, lengths.decode, lengths.norm, lengths.loss):
        call(300, 200)
    assert torch.cuda.current_device() == 0
    assert len(seen) == 11 and all(devices == {1} for devices in seen.values()), seen

    from engine import runtime
    from engine.config import ModelConfig
    from engine.decoders import DecodeGraphs
    from engine.model import GPT, KVCache
    from engine.runtime import ToHost, choose

    probed: list[int] = []
    replaced: Any = runtime
    replaced.why_not_triton = lambda device: probed.append(torch.cuda.current_device())
    device = choose("cuda:1", "bf16").device
    assert device == torch.device("cuda", 1) and torch.cuda.current_device() == 1 and probed == [1]

    @torch.inference_mode()
    def serve() -> None:
        """Decode as a server does, in a thread of its own, where another device is current."""
        assert torch.cuda.current_device() == 0
        config = ModelConfig(vocab_size=64, width=32, blocks=1, heads=2, context=32)
        model = GPT(config)
        cache = KVCache(config, 2, 32, device=device, dtype=torch.float32)
        seen.clear()
        logits = DecodeGraphs(model, cache, torch.zeros(2, dtype=torch.int64)).logits(2, 1)
        assert seen and all(devices == {1} for devices in seen.values()), seen
        streams.append(torch.cuda.current_stream(device))
        ToHost(logits).read()

    streams: list[Any] = []
    recorded: list[Any] = []
    replaced = torch.cuda.Event
    replaced.record = lambda self, stream=None: recorded.append(stream or torch.cuda.current_stream())
    failed: list[BaseException] = []
    threading.excepthook = lambda about: failed.append(about.exc_value or SystemExit())
    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    assert recorded == streams


if __name__ == "__main__":
    main()
