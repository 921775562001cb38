"""What the input pipeline gives: `python -m benchmarks.input_pipeline`.

From the repository's root; the data are made in a temporary folder (2.2 GB by default).

- Images in a second of CPU time, decoded and centre-cropped, not mirrored, from JPEGs of ImageNet's
  usual size: by the training loader from an array_record set, and by plain Pillow in a loop over the
  same files, in turns; the ratio is that of each round. CPU time is that of a core, whatever else the
  machine does.
- Latents in a second of wall time through the training loader with two threads: moments of both
  flips in array_record shards, of which a batch has one.
- Resident memory over many reads of single latents.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from absl import flags
from PIL import Image

from benchmarks import measuring
from cfjax import program
from cfjax.data import latents
from cfjax.data.image_listing import list_images
from cfjax.data.image_records import ArrayRecordSource, Storing
from cfjax.data.image_shards import write_image_set
from cfjax.data.images import center_crop, to_model_range
from cfjax.data.loader import TrainLoader
from cfjax.data.record_shards import ShardWriter
from cfjax.data.sources import Source

BATCH_SIZE = 64
LATENTS_BATCH_SIZE = 256
JPEG_SIZE = (500, 375)  # ImageNet's most frequent


def make_jpegs(folder: Path, count: int) -> None:
    """Smooth pictures with some noise, of about 100 kB, as photographs have."""
    place = folder / "class"
    place.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (20, 27, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize(JPEG_SIZE, Image.BICUBIC), np.int16)
        pixels = pixels + rng.normal(0, 9, pixels.shape).astype(np.int16)
        smooth = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        smooth.save(place / f"{i:04d}.jpg", quality=95)


def make_latents(folder: Path, count: int, size: int, channels: int, per_shard: int) -> None:
    """Normal moments in bfloat16; few different ones, as they take time to draw."""
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((16, 2, size, size, 2 * channels), np.float32)
    drawn = drawn.astype(ml_dtypes.bfloat16)
    description = {
        "size": size,
        "channels": channels,
        "dtype": "bfloat16",
        "class_names": ["class"],
    }
    writer = ShardWriter(folder / "train", latents.KIND, description, -(-count // per_shard))
    writer.begin()
    for shard in writer.missing():
        numbers = range(shard * per_shard, min(count, (shard + 1) * per_shard))
        writer.write(shard, (latents.pack(drawn[i % 16], 0, i) for i in numbers))
    writer.finish()


def loader_seconds(
    source: Source,
    batch_size: int,
    num_batches: int,
    num_threads: int,
    clock: Callable[[], float],
    horizontal_flip: bool,
) -> float:
    """Seconds on a clock in which a loader gives so many batches, from its start."""
    with TrainLoader(
        source,
        seed=0,
        rows=np.arange(batch_size),
        global_batch_size=batch_size,
        horizontal_flip=horizontal_flip,
        num_threads=num_threads,
    ) as loader:
        began = clock()
        for _ in itertools.islice(loader, num_batches):
            pass
        return clock() - began


def pillow_seconds(files: Sequence[str], size: int) -> float:
    """CPU seconds to decode and centre-crop files in a loop, in the range of the model."""
    began = time.process_time()
    for start in range(0, len(files), BATCH_SIZE):
        batch = []
        for file in files[start : start + BATCH_SIZE]:
            with Image.open(file) as image:
                batch.append(center_crop(image.convert("RGB"), size))
        to_model_range(np.stack(batch))
    return time.process_time() - began


def images_report(folder: Path, count: int, size: int, rounds: int) -> dict[str, float]:
    """Images in a CPU second, against Pillow's in turns."""
    make_jpegs(folder / "jpegs", count)
    images = list_images(folder / "jpegs")
    write_image_set(
        folder / "prepared" / "train",
        images,
        ["class"],
        Storing(),
        examples_per_shard=count,
        on_corrupt="refuse",
        num_processes=1,
    )
    source = ArrayRecordSource(folder / "prepared", "train", size, 3)
    files = [image.path for image in images]
    num_batches = count // BATCH_SIZE
    times = [  # without threads, which would read further batches than those that are counted
        (
            loader_seconds(source, BATCH_SIZE, num_batches, 0, time.process_time, False),
            pillow_seconds(files, size),
        )
        for _ in range(rounds + 1)
    ][1:]
    return {
        "image_bytes": statistics.mean(image.num_bytes for image in images),
        "images_per_cpu_second": count / statistics.median(ours for ours, _ in times),
        "pillow_images_per_cpu_second": count / statistics.median(theirs for _, theirs in times),
        "images_ratio_to_pillow": statistics.median(theirs / ours for ours, theirs in times),
        "images_ratio_min": min(theirs / ours for ours, theirs in times),
        "images_ratio_max": max(theirs / ours for ours, theirs in times),
    }


def resident_mib() -> float:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def memory_report(source: Source, num_reads: int) -> dict[str, float]:
    """Resident memory when a tenth of the reads have warmed up, and its growth over all of them."""
    rng = np.random.default_rng(0)
    for _ in range(num_reads // 10):
        source.examples_at(rng.integers(0, len(source), 1))
    before = resident_mib()
    for _ in range(num_reads):
        source.examples_at(rng.integers(0, len(source), 1))
    return {"resident_mib_before": before, "resident_mib_growth": resident_mib() - before}


def latents_report(source: Source, num_batches: int, rounds: int) -> dict[str, float]:
    """Latents a second through the loader."""
    count = num_batches * LATENTS_BATCH_SIZE
    seconds = [
        loader_seconds(source, LATENTS_BATCH_SIZE, num_batches, 2, time.perf_counter, True)
        for _ in range(rounds + 1)
    ][1:]
    return {
        "latents_per_second": count / statistics.median(seconds),
        "latents_per_second_min": count / max(seconds),
        "latents_per_second_max": count / min(seconds),
    }


def main(_: Sequence[str]) -> None:
    """Runs the benchmark."""
    values = flags.FLAGS.flag_values_dict()
    count, size, channels = (values[name] for name in ("latents", "latent_size", "channels"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = images_report(folder, values["images"], values["size"], values["rounds"])
        make_latents(folder / "latents", count, size, channels, per_shard=8192)
        source = latents.LatentsSource(folder / "latents", "train", size, channels)
        rates = latents_report(source, max(1, count // LATENTS_BATCH_SIZE), values["rounds"])
        memory = memory_report(source, values["reads"])
        measuring.report(
            {
                "benchmark": "input_pipeline",
                "images": values["images"],
                "image_size": values["size"],
                **images,
                "latents": count,
                "latent_shape": f"{size}x{size}x{channels} bfloat16",
                **rates,
                "reads": values["reads"],
                **memory,
            }
        )


if __name__ == "__main__":
    flags.DEFINE_integer("rounds", 5, "Timed rounds.", 1)
    flags.DEFINE_integer("images", 512, "JPEGs that are decoded in a round.", BATCH_SIZE)
    flags.DEFINE_integer("size", 256, "Height and width of the crops.", 1)
    flags.DEFINE_integer("latents", 65_536, "Latents in the set and in a round.", 1)
    flags.DEFINE_integer("latent_size", 16, "Height and width of the latents.", 1)
    flags.DEFINE_integer("channels", 16, "Of the latents.", 1)
    flags.DEFINE_integer("reads", 100_000, "Single reads over which memory is watched.", 4)
    program.run(main)
