"""Episodic training of FS-DINO, small: what is frozen stays, all else is reached, one episode can be fitted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from fssdeploy.data.dataset import IGNORE
from fssdeploy.errors import InputError
from fssdeploy.images.geometry import PADDING_COLOUR
from fssdeploy.systems import fsdino
from fssdeploy.training.augment import NONE, Augmentation
from fssdeploy.training.episodic import Episodes, EpisodicRecipe, EpisodicSettings
from fssdeploy.training.losses import dice_bce
from fssdeploy.training.schedule import Phase
from fssdeploy.weights.fsdino import fill
from tests.evaluation.squares import Squares
from tests.networks import SMALL
from tests.training.toys import Stopped, check_same_end, train

SIZE = SMALL.image_size


def recipe(dataset: Squares | None = None, *, train_adapter: bool = False, steps: int = 2) -> EpisodicRecipe:
    model = fsdino.build(dataclasses.replace(SMALL, train_adapter=train_adapter))
    fill(model, [], untrained_seed=3)
    settings = EpisodicSettings(phases=(Phase(steps, 2, SIZE),), ema=0.5)
    return EpisodicRecipe(dataset or Squares(), 0, model, settings, {"dataset": "squares"})


def episodes(shot: int = 2, how: Augmentation = NONE, geometry: str = "squash", seed: int = 0) -> Episodes:
    return Episodes(Squares(), 0, shot, how, geometry, seed)


@pytest.mark.parametrize("train_adapter", [False, True])
def test_frozen_parts_stay_and_all_others_learn(tmp_path: Path, train_adapter: bool) -> None:
    trained = recipe(train_adapter=train_adapter)
    model = trained.objective.model
    before = {name: each.clone() for name, each in model.named_parameters()}
    train(trained, tmp_path)
    frozen = ["encoder.", "decoder.iou_prediction_head."]
    frozen += [f"decoder.output_hypernetworks_mlps.{number}." for number in (1, 2, 3)]
    frozen += [] if train_adapter else ["adapter."]
    for name, parameter in model.named_parameters():
        still = name.startswith(tuple(frozen))
        assert (parameter.grad is None) == still, name
        assert torch.equal(parameter, before[name]) == still, name


def test_an_unreadable_picture_in_the_middle(tmp_path: Path) -> None:
    """It is counted, another episode takes its place, and a second run does the same."""
    dataset = Squares()
    stream = recipe(dataset).examples
    drawn = [stream.describe(position, 0) for position in range(8)]
    dataset.broken = {drawn[4].split(": ")[1].split(" from ")[0]}
    hit = sum(bool(dataset.broken & set(each.replace(",", "").split())) for each in drawn)
    outcome = train(recipe(dataset, steps=4), tmp_path / "run")
    assert outcome.skipped >= hit >= 1
    again = train(recipe(dataset, steps=4), tmp_path / "again")
    assert (again.skipped, again.last) == (outcome.skipped, outcome.last)
    check_same_end(tmp_path / "again", tmp_path / "run")

    dataset.broken = {item for items in dataset.listing(0, "train").values() for item in items}
    with pytest.raises(InputError) as caught:
        train(recipe(dataset), tmp_path / "none")
    assert caught.value.code == "data_unusable"


def test_continued_as_if_never_stopped(tmp_path: Path) -> None:
    train(recipe(train_adapter=True, steps=4), tmp_path / "whole", save_every=2)
    stopped = recipe(train_adapter=True, steps=4)
    forward, calls = stopped.objective.forward, []

    def stop(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        calls.append(1)
        if len(calls) == 4:
            raise Stopped
        return forward(batch)

    stopped.objective.forward = stop  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        train(stopped, tmp_path / "stopped", save_every=2)
    assert train(recipe(train_adapter=True, steps=4), tmp_path / "stopped", save_every=2).steps == 2
    check_same_end(tmp_path / "stopped", tmp_path / "whole")


def test_one_episode_is_fitted() -> None:
    torch.manual_seed(0)
    chosen = recipe(train_adapter=True)
    batch = {name: each.unsqueeze(0) for name, each in chosen.examples.draw(0, 0, SIZE).items()}
    optimiser = torch.optim.AdamW([each for each in chosen.objective.parameters() if each.requires_grad], lr=2e-3)
    course = []
    for _ in range(60):
        optimiser.zero_grad()
        losses = chosen.objective(batch)
        losses["loss"].backward()
        optimiser.step()
        course.append({name: float(value.detach()) for name, value in losses.items()})
    assert course[0]["loss"] == pytest.approx(course[0]["final"] + course[0]["prior"])
    assert course[-1]["loss"] < 0.5 * course[0]["loss"]
    assert course[0]["miou"] < 0.5 and course[-1]["miou"] > 0.75


def test_the_losses_are_those_of_the_three_verbs() -> None:
    """Means of the states of the shots, both masks at the size of the picture, Dice + BCE on each."""
    chosen = recipe()
    model, pair = chosen.objective.model, [episodes().draw(position, 0, SIZE) for position in (0, 1)]
    with torch.no_grad():
        found = chosen.objective({name: torch.stack([each[name] for each in pair]) for name in pair[0]})
        values = []
        for each in pair:
            tokens, _ = model.encode(each["support"])
            state = model.enroll(tokens, (each["support_mask"] == 1).float().unsqueeze(1))
            mean = {name: tensor.mean(0, keepdim=True) for name, tensor in state.items()}
            for logits in model.segment(*model.encode(each["query"].unsqueeze(0)), mean):
                full = torch.nn.functional.interpolate(logits, size=(SIZE, SIZE), mode="bilinear")
                values.append(float(dice_bce(full[0], each["query_mask"].unsqueeze(0))))
    assert float(found["final"]) == pytest.approx(sum(values[::2]) / 2, rel=1e-4)
    assert float(found["prior"]) == pytest.approx(sum(values[1::2]) / 2, rel=1e-4)


def test_examples_depend_on_seed_and_position_alone() -> None:
    def all_of(stream: Episodes, attempt: int = 0) -> list[bytes]:
        drawn = [stream.draw(position, attempt, 40) for position in (3, 0, 7)]
        return [tensor.numpy().tobytes() for each in drawn for _, tensor in sorted(each.items())]

    how = Augmentation()
    assert all_of(episodes(how=how)) == all_of(episodes(how=how))
    assert all_of(episodes(how=how)) != all_of(episodes(how=how, seed=1))
    assert all_of(episodes(how=how)) != all_of(episodes(how=how), attempt=1)


def test_an_example_is_what_its_description_says() -> None:
    dataset, stream = Squares(), episodes()
    for position in range(6):
        name, rest = stream.describe(position, 0).split(": ")
        query, supports = rest.split(" from ")
        shown = [query, *supports.split(", ")]
        assert len(set(shown)) == 3
        index = dataset.class_names.index(name)
        assert index in dataset.classes(0, "train")
        example = stream.draw(position, 0, 40)
        assert example["support"].shape == (2, 3, 40, 40) and example["support_mask"].shape == (2, 40, 40)
        masks = [example["query_mask"], *example["support_mask"]]
        pictures = [example["query"], *example["support"]]
        for item, mask, picture in zip(shown, masks, pictures, strict=True):
            assert set(mask.unique().tolist()) == {0, 1, IGNORE}  # the squares have a border that is not judged
            colours = picture[:, mask == 1].float().mean(1)
            wanted = np.array(dataset.picture(item)[dataset.mask(item, index) == 1].mean(0))
            np.testing.assert_allclose(colours.numpy(), wanted, atol=12)


def test_letterbox_ignores_what_it_adds() -> None:
    example = episodes(geometry="letterbox").draw(0, 0, 48)  # squares are 40 x 48
    assert (example["query_mask"][40:] == IGNORE).all() and not (example["query_mask"][:40] == IGNORE).all(1).any()
    assert (example["query"][:, 40:] == torch.tensor(PADDING_COLOUR).view(3, 1, 1)).all()
    squashed = episodes().draw(0, 0, 48)
    assert not (squashed["query_mask"][40:] == IGNORE).any()


def test_an_object_is_never_moved_out_of_its_picture() -> None:
    stream = episodes(how=Augmentation((3.0, 4.0), 0.0, 0.0, 0.0))
    for position in range(12):
        example = stream.draw(position, 0, 40)
        assert (example["query_mask"] == 1).any() and (example["support_mask"] == 1).flatten(1).any(1).all()
