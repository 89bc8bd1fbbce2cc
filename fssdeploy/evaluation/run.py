"""A whole evaluation: folds, baselines beside the system, files that let it continue, and the report."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fssdeploy.data.dataset import IGNORE, Dataset
from fssdeploy.data.episodes import EpisodeList
from fssdeploy.errors import InputError
from fssdeploy.evaluation.evaluate import Canvas, evaluate
from fssdeploy.evaluation.journal import Journal, open_journal
from fssdeploy.evaluation.predictors import CachedEncoder, StagedPredictor, k_shot
from fssdeploy.evaluation.priors import CALIBRATION_EPISODES, PriorPredictor, calibrate
from fssdeploy.evaluation.published import published
from fssdeploy.evaluation.sheet import draw_sheet
from fssdeploy.evaluation.summary import Summary, mean_over_folds, summarise
from fssdeploy.files import made_folder, write_atomic
from fssdeploy.glue.gsm.options import GsmOptions
from fssdeploy.images.overlay import save_picture
from fssdeploy.pipeline import StagedSystem
from fssdeploy.report import Report, Table

REPORT = "report.json"
SKIPPED_SHOWN = 10  # in the notes; the JSON names all


@dataclass(frozen=True)
class Subject:
    """The system under test.

    `family` is what papers call it; `fingerprint` covers all its weights; `note` says that they are not trained;
    `boost` holds the options of GSM if that is to stand around `system`.
    """

    family: str
    name: str
    system: StagedSystem
    fingerprint: str
    canvas: Canvas
    note: str = ""
    boost: GsmOptions | None = None

    def boosted(self, options: GsmOptions) -> Subject:
        """The same under GSM, with a fingerprint that covers the options."""
        text = f"{self.fingerprint} gsm {json.dumps(options.to_dict(), sort_keys=True)}"
        return replace(
            self,
            family=f"{self.family}+gsm",
            name=f"{self.name}+gsm",
            fingerprint=hashlib.sha256(text.encode()).hexdigest(),
            boost=options,
        )


@dataclass(frozen=True)
class _Fold:
    """What one list gave; thresholds are those of the priors."""

    episodes: EpisodeList
    summaries: dict[str, Summary]
    skipped: list[dict[str, Any]]
    thresholds: dict[str, float]
    files: list[Path]


@dataclass(frozen=True)
class Run:
    """A whole evaluation of a system on a data set; `perform` it, any number of times.

    With `out`, every list, every finished episode, a contact sheet of every fold and the report lie there, and a later
    run continues what was broken off.
    """

    subject: Subject
    dataset: Dataset
    lists: Sequence[EpisodeList]
    on_canvas: bool = False
    priors: bool = False
    calibration_episodes: int = CALIBRATION_EPISODES
    out: Path | None = None
    progress: Callable[[str], None] = lambda _: None

    def perform(self) -> Report:
        """Evaluate every list.

        InputError if `out` holds a run under another protocol or of another system, if the system cannot be boosted as
        it should, or has no tokens for priors.
        """
        subject = self.subject
        encoder = CachedEncoder(subject.system)
        predictor = StagedPredictor(encoder, subject.name, subject.fingerprint, subject.boost)
        if self.priors:
            self._check_tokens()
        with made_folder(self.out) if self.out else nullcontext():
            folds = [self._fold(episodes, encoder, predictor) for episodes in self.lists]
            report = self._report(folds, predictor)
            if self.out:
                files = [*(file for fold in folds for file in fold.files), self.out / REPORT]
                report.data["files"] = files
                report.facts["written to"] = str(self.out)
                write_atomic(self.out / REPORT, (report.json() + "\n").encode())
        return report

    def _check_tokens(self) -> None:
        system = self.subject.system
        if not any(tensor.name == "tokens" for spec in system.specs.values() for tensor in spec.outputs):
            raise InputError(
                "priors_unsupported",
                f"no priors can be made beside '{self.subject.name}'",
                "its encoder gives no tokens",
                "Leave out --priors.",
            )

    def _fold(self, episodes: EpisodeList, encoder: CachedEncoder, predictor: StagedPredictor) -> _Fold:
        fold = episodes.fold

        def say(text: str) -> None:
            self.progress(f"fold {fold}: {text}")

        thresholds: dict[str, float] = {}
        with self.open_journal_of(episodes) as journal:
            if journal and self.out:
                episodes.save(self.out / list_file(fold))
            if self.priors:
                thresholds = self._thresholds(journal, encoder, episodes, say)
            beside = [
                PriorPredictor(encoder, name, threshold, self.subject.fingerprint)
                for name, threshold in thresholds.items()
            ]
            found = evaluate(
                predictor,
                self.dataset,
                episodes.episodes,
                beside=beside,
                canvas=self._canvas,
                journal=journal,
                progress=say,
            )
        names = [predictor.name, *thresholds]
        summaries = {name: summarise(found.records, name, episodes.seed) for name in names}
        files = []
        if self.out:
            say("drawing the contact sheet")
            sheet = self.out / sheet_file(fold)
            save_picture(sheet, draw_sheet(predictor, self.dataset, episodes.episodes, found.records, self._canvas))
            files = [self.out / list_file(fold), self.out / journal_file(fold), sheet]
        return _Fold(episodes, summaries, found.skipped, thresholds, files)

    @property
    def _canvas(self) -> Canvas | None:
        return self.subject.canvas if self.on_canvas else None

    def _thresholds(
        self, journal: Journal | None, encoder: CachedEncoder, episodes: EpisodeList, say: Callable[[str], None]
    ) -> dict[str, float]:
        if journal and journal.thresholds:
            return journal.thresholds
        chosen = calibrate(
            encoder,
            self.dataset,
            episodes.fold,
            episodes.shot,
            episodes.seed,
            canvas=self._canvas,
            episodes=self.calibration_episodes,
            progress=say,
        )
        if journal:
            journal.add_thresholds(chosen)
        return chosen

    def open_journal_of(self, episodes: EpisodeList) -> AbstractContextManager[Journal | None]:
        if not self.out:
            return nullcontext()
        binding = {**self._protocol([episodes]), "system": self.subject.fingerprint}
        return open_journal(self.out / journal_file(episodes.fold), binding)

    def _protocol(self, lists: Sequence[EpisodeList]) -> dict[str, Any]:
        """All that decides on the numbers beside the system itself."""
        hashes = {str(each.fold): list_hash(each) for each in lists}
        return {
            "dataset": self.dataset.name,
            "fold": lists[0].fold if len(lists) == 1 else "all",
            "shot": lists[0].shot,
            "seed": lists[0].seed,
            "episodes": sum(map(len, lists)),
            "pairs": f"uniform over {self.dataset.uniform_over}",
            "list": next(iter(hashes.values())) if len(lists) == 1 else hashes,
            "space": "canvas" if self.on_canvas else "original",
            "canvas": self.subject.canvas.side,
            "geometry": self.subject.canvas.geometry,
            "ignored_label": IGNORE,
            "k_shot": k_shot(self.subject.system),
            "runtime": self.subject.system.engine.name,
            "calibration_episodes": self.calibration_episodes if self.priors else 0,
        }

    def _report(self, folds: Sequence[_Fold], predictor: StagedPredictor) -> Report:
        subject, dataset, shot = self.subject, self.dataset, folds[0].episodes.shot
        means = {name: mean_over_folds([fold.summaries[name] for fold in folds]) for name in folds[0].summaries}
        whole = means[predictor.name]
        skipped = [{"fold": fold.episodes.fold, **each} for fold in folds for each in fold.skipped]
        one_of_many = len(folds) == 1 and dataset.folds > 1
        paper = published(subject.family, dataset.name, shot, folds[0].episodes.fold if one_of_many else None)
        protocol = self._protocol(self.lists)
        by_fold = {str(fold.episodes.fold): self._fold_data(fold, predictor.name) for fold in folds}
        priors = {
            name: {
                **means[name].to_dict(dataset.class_names),
                "thresholds": {str(fold.episodes.fold): fold.thresholds[name] for fold in folds},
            }
            for name in folds[0].thresholds
        }

        facts: dict[str, Any] = {"mIoU": f"{whole.miou:.2f}   (95 %: {_range(whole)})", "FB-IoU": f"{whole.fb_iou:.2f}"}
        if whole.video:
            facts["J&F"] = f"{whole.video.both:.2f}   (J {whole.video.j:.2f}, F {whole.video.f:.2f})"
        facts["paper"] = f"{paper.value} {paper.measure}: {paper.system}; {paper.source}" if paper else None
        facts["episodes"] = f"{whole.episodes}, skipped {len(skipped)}, support not seen {whole.blind}"
        facts |= {name.replace("_", " "): value for name, value in protocol.items() if name not in ("episodes", "list")}
        facts["episode list"] = ", ".join(f"{list_hash(each)[:16]} (fold {each.fold})" for each in self.lists)
        facts["system"] = f"{subject.name}, {subject.fingerprint[:16]}"
        if subject.boost:
            changed = [
                f"{name}={value}"
                for name, value in subject.boost.to_dict().items()
                if value != getattr(GsmOptions, name)
            ]
            facts["boost"] = f"gsm, {', '.join(changed) or 'all options at their defaults'}"

        classes = [[dataset.class_names[index], iou, count] for index, (iou, count) in whole.per_class.items()]
        tables = [Table("classes", ["class", "IoU", "episodes"], _rounded(classes))]
        if len(folds) > 1:
            tables.insert(0, _folds_table(folds, by_fold, predictor.name))
        if priors:
            tables.append(_priors_table(means, priors))
        data = {
            **whole.to_dict(dataset.class_names),
            "skipped": len(skipped),
            "skipped_episodes": skipped,
            "folds": by_fold,
            "published": asdict(paper) if paper else None,
            **({"priors": priors} if priors else {}),
            "protocol": {**protocol, "notes": list(dataset.notes)},
            "system": {"name": subject.name, "fingerprint": subject.fingerprint, **predictor.describe()},
        }
        title = f"evaluated {subject.name} on {dataset.name}, {shot} shot(s)"
        return Report(title, facts, tables, self._notes(folds, whole, skipped), data)

    def _fold_data(self, fold: _Fold, name: str) -> dict[str, Any]:
        paper = published(self.subject.family, self.dataset.name, fold.episodes.shot, fold.episodes.fold)
        return {
            **fold.summaries[name].to_dict(self.dataset.class_names),
            "skipped": len(fold.skipped),
            "published": asdict(paper) if paper else None,
        }

    def _notes(self, folds: Sequence[_Fold], whole: Summary, skipped: Sequence[dict[str, Any]]) -> list[str]:
        notes = [self.subject.note] if self.subject.note else []
        notes += self.dataset.notes
        wanted = {index for fold in folds for index in self.dataset.classes(fold.episodes.fold, "test")}
        missing = [self.dataset.class_names[index] for index in sorted(wanted - set(whole.per_class))]
        if missing:
            notes.append(f"No episode, and no part in the mean: {', '.join(missing)}.")
        notes += [f"SKIPPED {error['what']}: {error['why']}".rstrip(": ") for error in skipped[:SKIPPED_SHOWN]]
        if len(skipped) > SKIPPED_SHOWN:
            notes.append(f"SKIPPED {len(skipped) - SKIPPED_SHOWN} more.")
        return notes


def list_file(fold: int) -> str:
    return f"list-fold{fold}.jsonl"


def journal_file(fold: int) -> str:
    return f"episodes-fold{fold}.jsonl"


def sheet_file(fold: int) -> str:
    return f"sheet-fold{fold}.png"


def list_hash(episodes: EpisodeList) -> str:
    """sha256 of the episodes, whatever file they lie in."""
    rows = [asdict(episode) for episode in episodes.episodes]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _folds_table(folds: Sequence[_Fold], by_fold: Mapping[str, Any], name: str) -> Table:
    rows = []
    for (number, data), fold in zip(by_fold.items(), folds, strict=True):
        summary, paper = fold.summaries[name], data["published"]
        rows.append([number, summary.miou, _range(summary), summary.fb_iou, paper["value"] if paper else None])
    return Table("folds", ["fold", "mIoU", "95 %", "FB-IoU", "paper"], _rounded(rows))


def _priors_table(means: Mapping[str, Summary], priors: Mapping[str, Any]) -> Table:
    """The priors, and the system below them."""
    rows = []
    for name in [*priors, *(each for each in means if each not in priors)]:
        thresholds = ", ".join(map(str, priors[name]["thresholds"].values())) if name in priors else None
        rows.append([name, means[name].miou, _range(means[name]), means[name].fb_iou, thresholds])
    columns = ["method", "mIoU", "95 %", "FB-IoU", "threshold by fold"]
    return Table("training-free priors on the same encoder", columns, _rounded(rows))


def _range(summary: Summary) -> str:
    return " to ".join(f"{end:.2f}" for end in summary.interval)


def _rounded(rows: list[list[Any]]) -> list[list[Any]]:
    return [[round(value, 2) if isinstance(value, float) else value for value in row] for row in rows]
