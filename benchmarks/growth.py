"""Growth of time and memory with ten and a hundred times the photographs, and with a thousand trials."""

import contextlib
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from PIL import Image, ImageOps

from benchmarks.measure import Row, in_turns, temporary_store
from signdigits import search, startup, threads
from signdigits.config import DataParameters, Hyperparameters, SourceParameters, StudyParameters
from signdigits.data import dataset, loading, sources
from signdigits.model import architecture, input_pipeline
from signdigits.model.augmentation import Augmentation
from signdigits.tuning.space import Space

FACTORS = (10, 100)
EPOCHS = {1: 10, 10: 2, 100: 1}  # that are timed, after one that is not
BATCH = 128
TRIALS = 1000
ROUNDS = 20
TINY = 16  # pixels


def rows(photographs: str) -> list[Row]:
    return [*images(photographs), trials(photographs)]


def images(photographs: str) -> list[Row]:
    """Time per image and epoch, and peak memory; each number of images in a process of its own."""
    originals = sources.resolve_source(photographs).resolve()
    found = {1: in_a_process(originals, 1)}
    for factor in FACTORS:
        with TemporaryDirectory(dir=".") as folder:
            copies = Path(folder, "copies").resolve()
            copy(originals, copies, factor)
            found[factor] = in_a_process(copies, factor)
    loads = {factor: f"{seen['load'] / seen['images'] * 1e3:.1f}" for factor, seen in found.items()}
    made = [
        Row(
            f"time per image and epoch, {factor} times the images", "the images as they are",
            found[factor]["epoch"] / found[1]["epoch"], 1.3, False,
            f"{found[factor]['epoch'] * 1e3:.2f} ms against {found[1]['epoch'] * 1e3:.2f} ms; {found[factor]['images']:,.0f} "
            f"images, read and decoded in {loads[factor]} ms each ({loads[1]} ms)",
        )
        for factor in FACTORS
    ]  # fmt: skip
    memory = ", ".join(f"{factor} times: {seen['memory']:.1f} GB" for factor, seen in found.items())
    most = found[FACTORS[-1]]["memory"]
    return [*made, Row(f"peak memory, {FACTORS[-1]} times the images, in GB", "", most, 4.0, False, memory)]


def copy(originals: Path, target: Path, times: int) -> None:
    """Fill `target` with so many copies of each photograph, each a little darker or lighter, shifted, and noisy."""
    found = dataset.scan_dataset(SourceParameters(data=str(originals)))
    for name in found.class_names:
        (target / name).mkdir(parents=True)

    def write(number: int) -> None:
        photograph = found.photographs[number]
        random, path = np.random.default_rng(number), found.folder / photograph.path
        with Image.open(path) as image:
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), np.int16)
        for version in range(times):
            changed = np.roll(pixels, random.integers(-2, 3, 2), (0, 1)) + random.integers(-15, 16)
            changed = (changed + random.integers(-3, 4, pixels.shape, np.int16)).clip(0, 255).astype(np.uint8)
            name = f"{path.stem}-{number}-{version:03d}.jpg"
            Image.fromarray(changed).save(target / found.class_names[photograph.label] / name, quality=90)

    for _ in threads.map_in_threads(write, range(len(found.photographs)), f"copying {times} times"):
        pass


def in_a_process(photographs: Path, factor: int) -> dict[str, float]:
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, photographs, EPOCHS[factor]).result()


def measure(photographs: Path, epochs: int) -> dict[str, float]:
    """Seconds to load, seconds per image and epoch of training, peak memory in GB."""
    startup.import_tensorflow()
    # A file of decoded photographs is made in the working directory, and goes with it.
    with TemporaryDirectory(dir=".") as workshop, contextlib.chdir(workshop):
        return measure_here(photographs, epochs)


def measure_here(photographs: Path, epochs: int) -> dict[str, float]:
    started = time.perf_counter()
    loaded = loading.load_data(DataParameters(data=str(photographs)))
    load = time.perf_counter() - started
    network = architecture.build_network(
        loaded.fitting.shape, len(loaded.dataset.class_names), precision=architecture.resolve_precision("auto")
    )
    architecture.compile_network(network, Hyperparameters())
    batches = input_pipeline.training_batches(loaded.fitting, BATCH, Augmentation(1.0), seed=0)
    steps = input_pipeline.steps_per_epoch(loaded.fitting, BATCH)
    network.fit(batches, steps_per_epoch=steps, epochs=1, verbose=0)
    started = time.perf_counter()
    network.fit(batches, steps_per_epoch=steps, epochs=epochs, verbose=0)
    epoch = (time.perf_counter() - started) / epochs / len(loaded.fitting)
    unit = 1 if sys.platform == "darwin" else 1024
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    return {"images": float(len(loaded.dataset.photographs)), "load": load, "epoch": epoch, "memory": memory}


def trials(photographs: str) -> Row:
    """What a trial that trains next to nothing costs in a study of a thousand, against one of its first."""
    loaded = tiny(loading.load_data(DataParameters(data=photographs, image_size=TINY)))
    with temporary_store("growth") as folder:
        space = Space.of("notebook", epochs=1)
        young = StudyParameters(study_name="young", pruner="median", storage=f"sqlite:///{folder}/optuna.db")
        old = replace(young, study_name="old")
        with search.open_study(loaded, space, old) as opened:
            fill(opened)
        with search.open_study(loaded, space, young) as opened:
            ways = {"young": next_trial(opened)}
            first = in_turns(ways, ROUNDS)["young"]
        with search.open_study(loaded, space, old) as opened:
            last = in_turns({"old": next_trial(opened)}, ROUNDS)["old"]
    detail = f"{last:.2f} s against {first:.2f} s"
    return Row(f"a trial in a study of {TRIALS}", f"one of the first {ROUNDS}", last / first, 2.0, False, detail)


def tiny(loaded: loading.Data) -> loading.Data:
    """The data with all but a hundred of the training and the validation images left out."""
    kept = np.concatenate([loaded.split.training[:100], loaded.split.validation[:100]])
    numbers = np.concatenate([np.arange(100), len(loaded.split.training) + np.arange(100)])
    split = replace(loaded.split, training=kept[:100], validation=kept[100:])
    return replace(loaded, split=split, fitting=loading.Images(loaded.fitting.x[numbers], loaded.fitting.y[numbers]))


def fill(opened: search.Search) -> None:
    """Give the study, and its run, so many finished trials that it will hold a thousand in the end."""
    client, random = mlflow.MlflowClient(), np.random.default_rng(0)
    experiment = mlflow.get_run(opened.run_id).info.experiment_id
    for number in range(TRIALS - ROUNDS - 1):
        run = client.create_run(
            experiment, tags={"mlflow.parentRunId": opened.run_id, "role": "trial", "trial": str(number)}
        )
        drawn = {"initial_learning_rate": 10 ** random.uniform(-4, -2), "decay_rate": random.uniform(0.1, 1)}
        for name, value in drawn.items():
            client.log_param(run.info.run_id, name, value)
        client.log_metric(run.info.run_id, "val_accuracy", drawn["decay_rate"])
        client.set_terminated(run.info.run_id)
        distributions: dict[str, BaseDistribution] = {
            "initial_learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
            "decay_rate": FloatDistribution(0.1, 1.0),
        }
        opened.study.add_trial(
            optuna.trial.create_trial(
                params=drawn, distributions=distributions, value=drawn["decay_rate"], intermediate_values={1: drawn["decay_rate"]},
                user_attrs={"mlflow_run_id": run.info.run_id},
            )
        )  # fmt: skip


def next_trial(opened: search.Search) -> Callable[[], object]:
    """The search, asked for one more finished trial."""

    def run() -> None:
        search.run_missing_trials(replace(opened, parameters=replace(opened.parameters, n_trials=opened.finished + 1)))

    return run
