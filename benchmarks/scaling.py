"""What sharding costs, and what the input pipeline gives: `python -m benchmarks.scaling`.

From the repository's root. The train step of `--config` (the quick start) runs on 1, 2, 4 and 8
virtual devices of this CPU at the same global batch: split over `data` and over `fsdp`. Each number
of devices has a process of its own. In each round all take their turn, one after the other, so that
other load on the machine slows all alike; reported are the median and the least of the rounds.

All devices share the same cores, so N of them can't be faster than one, and there are two answers
to what sharding costs:

- `slowdown`: the time over that of one device, less 1. That charges sharding with what only virtual
  devices pay for: N small programs instead of one large, and with `data` N updates of the same
  parameters on the same cores.
- `overhead`: the time over that of `apart`, less 1. There each of the N devices takes the train step
  by itself, for its part of the batch, and nothing is shared: the same small programs, the same
  updates, no collectives. This is the cost of sharding itself.

The quick start's parameters are too small to be split; `--config.mesh.min_split_size=0` splits them.

Both are medians of the ratio in each round. `cpu_overhead` is the same of CPU time, which other load
touches less.

`examples_per_second` is what the loader alone gives, without a device: of the digits, which are in
memory, and of a folder of JPEGs of 256x256 made for it, each decoded whenever it is asked for, as of
a folder that does not fit into memory; `times_train_step` is that over what the train step of the config
takes on one device, `configs/mnist.py` and `configs/image_folder.py`.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from benchmarks import measuring
from cfjax import build_data, program
from cfjax.config_loading import config_to_json, define_config_flag, load_config
from cfjax.data import image_folder
from cfjax.data.loader import TrainLoader

_DEVICES = (1, 2, 4, 8)


class Worker:
    """A process of `benchmarks.scaling_worker` with some devices."""

    def __init__(self, num_devices: int, config: ConfigDict):
        """Starts it."""
        device_flag = f"--xla_force_host_platform_device_count={num_devices}"
        environment = {"XLA_FLAGS": device_flag, "JAX_PLATFORMS": "cpu"}
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.scaling_worker"),
                f"--config_json={config_to_json(config)}",
            ],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.names: list[str] = []

    def wait(self) -> None:
        """Until it has compiled the train steps `names`."""
        _, self.names = self._hear()

    def take(self, name: str, count: int) -> tuple[float, float]:
        """Wall and CPU seconds of a train step, the mean of `count`."""
        self._process.stdin.write(f"{name} {count}\n")
        self._process.stdin.flush()
        wall, cpu = self._hear()
        return wall / count, cpu / count

    def _hear(self) -> list:
        line = self._process.stdout.readline()
        if not line:
            sys.exit(self._process.wait() or 1)  # it has said why
        return json.loads(line)

    def close(self) -> None:
        """Ends it."""
        self._process.communicate()


@contextlib.contextmanager
def workers(devices: Sequence[int], config: ConfigDict) -> Iterator[list[Worker]]:
    """A worker for each number of devices."""
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(contextlib.closing(Worker(n, config))) for n in devices]
        for worker in started:
            worker.wait()
        yield started


def train_step_rounds(
    devices: Sequence[int], config: ConfigDict, rounds: int, count: int
) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds by name and round; the first round is not counted."""
    times = {}
    with workers(devices, config) as running:
        for _ in range(rounds + 1):
            for worker in running:
                for name in worker.names:
                    times.setdefault(name, []).append(worker.take(name, count))
    return {name: taken[1:] for name, taken in times.items()}


def costs(times: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """What a report says of the rounds."""

    def ratio(name, base, clock):
        pairs = zip(times[name], times[base], strict=True)
        return statistics.median(a[clock] / b[clock] for a, b in pairs) - 1

    report = {}
    for name, taken in times.items():
        seconds = [wall for wall, _ in taken]
        axis, _, size = name.partition("=")
        report |= {
            f"{name} train_steps_per_second": 1 / statistics.median(seconds),
            f"{name} best": 1 / min(seconds),
        }
        if size != "1":
            report[f"{name} slowdown"] = ratio(name, "data=1", 0)
        if axis != "apart" and size != "1":
            report[f"{name} overhead"] = ratio(name, f"apart={size}", 0)
            report[f"{name} cpu_overhead"] = ratio(name, f"apart={size}", 1)
    return report


def loader_rate(config: ConfigDict, num_batches: int, rounds: int) -> float:
    """Examples a second that the loader gives to one process; the median of the rounds.

    The batches that are read ahead at first are not counted.
    """
    batch_size = config.train.global_batch_size
    loader = TrainLoader(
        build_data.source(config, "train", build_data.autoencoder(config)),
        seed=config.seed,
        rows=np.arange(batch_size),
        global_batch_size=batch_size,
        horizontal_flip=config.data.horizontal_flip,
        num_threads=config.data.num_threads,
    )
    rates = []
    with loader:
        for _ in range(rounds + 1):
            began = time.perf_counter()
            for _ in range(num_batches):
                next(loader)
            rates.append(num_batches * batch_size / (time.perf_counter() - began))
    return statistics.median(rates[1:])


def make_pictures(folder: Path, count: int, size: int) -> None:
    """`count` JPEGs in each of 2 classes, about as smooth and as noisy as photographs."""
    rng = np.random.default_rng(0)
    for label in ("a", "b"):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.int16)
            noisy = smooth + rng.integers(-8, 9, smooth.shape)
            picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
            picture.save(folder / label / f"{i}.jpg", quality=90)


def feeding(
    path: str, overrides: dict[str, Any], train_batch_size: int, rounds: int, num_batches: int
) -> dict[str, float]:
    """The loader's rate for a config, alone and over that of its train step on one device.

    The train step is that of `train_batch_size` examples: a rate, too, if another than the loader's.
    """
    config = load_config(path, overrides)
    rate = loader_rate(config, num_batches, rounds)
    fed = load_config(path, overrides | {"train.global_batch_size": train_batch_size})
    taken = train_step_rounds([1], fed, rounds, 1)["data=1"]
    eaten = train_batch_size / statistics.median(wall for wall, _ in taken)
    name = Path(path).stem
    return {
        f"{name} examples_per_second": rate,
        f"{name} times_train_step": rate / eaten,
    }


def main(_: Sequence[str]) -> None:
    """Runs the benchmark."""
    values = flags.FLAGS.flag_values_dict()
    devices = [int(number) for number in values["devices"]]
    config, rounds = values["config"], values["rounds"]
    times = train_step_rounds(devices, config, rounds, values["train_steps"])
    pipeline = {}
    if num_batches := values["batches"]:
        with tempfile.TemporaryDirectory() as folder:
            make_pictures(Path(folder), 200, 256)
            image_folder._MAX_BYTES_IN_MEMORY = 0
            pictures = {"data.path": folder}
            pipeline |= feeding("configs/mnist.py", {}, 64, rounds, num_batches)
            # 64 of its examples are a minute of a CPU.
            pipeline |= feeding("configs/image_folder.py", pictures, 2, 2, num_batches)
    measuring.report(
        {
            "benchmark": "scaling",
            "cores": os.cpu_count(),
            "batch_size": config.train.global_batch_size,
            **costs(times),
            **pipeline,
        }
    )


if __name__ == "__main__":
    define_config_flag(required=False)
    flags.FLAGS.set_default("config", "configs/mnist.py")
    flags.DEFINE_integer("rounds", 7, "Timed rounds.", 1)
    flags.DEFINE_integer("train_steps", 5, "Train steps of each kind in a round.", 1)
    flags.DEFINE_list("devices", list(map(str, _DEVICES)), "Numbers of devices, 1 among them.")
    flags.DEFINE_integer("batches", 20, "Batches of the loader in a round; 0 for no loader.", 0)
    program.run(main)
