"""The study's answers on made-up results: each effect is found as it was put in, and no hole or foreign file passes."""

import json

import numpy as np
import pytest

pytest.importorskip("lmms_eval", reason="needs the miniature's environment")

from scripts.evaluation.results import ResultError
from scripts.miniature.study import PLAN
from scripts.reporting import figures, statistics, study
from scripts.reporting.instrument import PARTS, SIZE_STATES, slopes
from scripts.reporting.study import BASE, COSINE, L2, TASKS, Study
from tests.helpers import ROOT
from tests.test_docs import sentences

N = 60


def made(name, seed, lower=0, kl_slope=-0.01, blind=False):
    """A result in which `lower` of N questions are wrong beside a tenth of them, and KL changes so much a token."""
    rng = np.random.default_rng([seed, len(name), sum(map(ord, name))])

    def right(wrong):
        answers = np.ones(N, int)
        answers[rng.permutation(N)[: int(wrong)]] = 0
        return "".join(map(str, answers))

    token = np.sort([np.random.default_rng(i).permutation(60)[:4] for i in range(12)])
    kl = 2 + kl_slope * token + rng.normal(0, 0.001, (12, 4))
    part = dict.fromkeys(("value", *PARTS), 0.5)
    sizes = {state: dict.fromkeys(("ce", "l2", "cosine"), part) for state in SIZE_STATES}
    said = {task: right((N if blind and task == "digits" else 6) + lower * (not blind)) for task in TASKS}
    if name == study.baseline(name):
        for task in TASKS:
            said |= {f"{task}_blind": right(N - 10), f"{task}_usual": right(N - 5)}
    return {
        "experiment": name, "seed": seed, "cpu": "one", "commit": "abcdefgh", "seconds": 60,
        "instrument": study.baseline(name), "right": said, "probe": {"sizes": sizes},
        "rows": {
            "fact_token": token.tolist(), "fact_right": rng.integers(0, 2, (12, 4)).tolist(), "fact_kl": kl.tolist(),
            "auroc": [None, *rng.uniform(0.4, 0.6, 9)], "hit": [None, *rng.integers(0, 2, 9).tolist()],
            "hit_chance": [None, *[0.25] * 9], "map_type": ["a"] * 10,
            "stage_1_ce": [1.0] * 5, "stage_1_ce_swapped": [2.0] * 5,
        },
    }  # fmt: skip


def put(folder, result):
    path = folder / f"results/seed{result['seed']}/{result['experiment']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return path


@pytest.fixture
def primary(tmp_path):
    """The primary runs, with cosine 12 of 60 questions worse and its KL not falling."""
    for name, seed in PLAN[:30]:
        put(tmp_path, made(name, seed, **({"lower": 12, "kl_slope": 0.0} if name == COSINE else {})))
    (tmp_path / "study.md").write_text(f"# Asked\n\nWords.\n\n{study.MARK}\nold")
    return tmp_path


def loaded(folder):
    return Study(study.load(PLAN, folder / "results"))


def test_an_effect_is_found_with_its_sign_and_none_where_there_is_none(primary):
    found = loaded(primary)
    for name, _, effect, p in study.primary(found):
        assert effect.seeds == list(range(100, 110))
        if name == COSINE:
            assert p < 0.01 and effect.interval["value"] == pytest.approx(-20) and effect.interval["ci95"][1] < 0
        else:
            smallest = study.told(effect, "points", differs=False)[1]
            assert p > 0.05 and float(smallest) == pytest.approx(effect.smallest(), rel=0.05)
    slower = found.effect(COSINE, BASE, ("kl_slope",))
    assert slower.interval["value"] == pytest.approx(0.01, abs=1e-4) and slower.differs
    text = "\n".join(study.answers(found))
    lines = [line for line in text.splitlines() if "| slope of the KL" in line][:3]
    assert [line.split("|")[3].strip() for line in lines] == ["it falls", "no", "yes"]


def test_the_interval_is_that_of_a_slow_bootstrap(primary):
    found = loaded(primary)
    effect = found.effect(COSINE, BASE, TASKS)
    rng, means = np.random.default_rng(7), []
    values = {(n, s, t): found.results[n, s].values[t] for n in (COSINE, BASE) for s in effect.seeds for t in TASKS}
    for _ in range(1500):
        seeds, drawn = rng.choice(effect.seeds, 10), {task: rng.integers(0, N, N) for task in TASKS}
        means.append(
            np.mean([(values[COSINE, s, t] - values[BASE, s, t])[drawn[t]].mean() for t in TASKS for s in seeds])
        )
    assert effect.interval["ci95"] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.35)


def test_a_baseline_that_does_not_see_is_left_out_of_its_task_alone(primary):
    put(primary, made(BASE, 103, blind=True))
    found = loaded(primary)
    assert found.effect(L2, BASE, ("easyvqa",)).seeds == list(range(100, 110))
    for tasks in (("digits",), TASKS):
        assert 103 not in found.effect(L2, BASE, tasks).seeds
        assert 103 in found.effect(L2, BASE, tasks, all_seeds=True).seeds
    assert "without seeds 103, whose baseline does not see; with them " in "\n".join(study.answers(found))


def test_holm_is_the_slow_one():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    for seed in range(20):
        ps = np.random.default_rng(seed).uniform(0, 0.3, 6).tolist()
        ranked, slow = sorted(ps), []
        for p in ps:
            slow.append(min(1, max((6 - k) * q for k, q in enumerate(ranked) if q <= p)))
        assert statistics.holm(ps) == pytest.approx(slow)


def test_slopes_are_those_of_least_squares():
    rng = np.random.default_rng(0)
    token = np.sort([rng.permutation(60)[:4] for _ in range(8)])
    token[0, 3] = -1
    value = rng.normal(size=token.shape)
    value[0, 3] = np.nan
    slow = [np.polyfit(t[t >= 0], v[t >= 0], 1)[0] for t, v in zip(token, value, strict=True)]
    assert slopes(token, value) == pytest.approx(slow)


def test_power_is_less_for_a_stricter_p():
    assert statistics.detectable(10) == pytest.approx(1.0, abs=0.05)
    assert statistics.detectable(10, 0.05 / 6) == pytest.approx(1.4, abs=0.05)


def test_the_page_is_the_same_from_the_same_files_and_says_what_is_missing(primary):
    page = primary / "study.md"
    put(primary, made(f"{L2}-sum", 100))  # a variant that is not whole is in the tables alone
    study.write(page, primary)
    assert "sum" not in (primary / "effects.svg").read_text() and "| l2 - sum |" in page.read_text()
    first = {path: path.read_bytes() for path in (page, *primary.glob("*.svg"))}
    assert len(first) == 1 + len(study.ALTS)
    study.write(page, primary)
    assert {path: path.read_bytes() for path in first} == first
    text = page.read_text()
    assert not [said for said in sentences(text) if len(said.split()) > 25]
    assert text.startswith(f"# Asked\n\nWords.\n\n{study.MARK}\n## Answers") and "old" not in text
    assert "**Not complete.**" in text and "- missing: llava-tiny-vista-sum, seeds 101, 102, 103, 104" in text
    assert text.count("| not known | no seed has both runs |") >= 6


def test_a_missing_run_and_one_that_was_not_finite_have_no_pair_and_are_named(primary):
    (primary / f"results/seed101/{L2}.json").unlink()
    broken = {k: v for k, v in made(L2, 102).items() if k not in ("right", "rows", "probe")} | {"nonfinite": "finetune"}
    put(primary, broken)
    found = loaded(primary)
    assert not study.compose(found.results, {})[1]  # no picture of a part
    effect = found.effect(L2, BASE, TASKS)
    assert effect.seeds == [100, *range(103, 110)] and study.told(effect, "points")[2] == "8 of 10"
    assert study.row(found, L2, BASE, TASKS)[2] == "no difference seen (not complete)"
    holes = study.holes(found.results)
    assert f"- missing: {L2}, seeds 101" in holes
    assert f"- the loss of {L2}, seed 102, was not finite in finetune" in holes


def cut_off(path):
    path.write_text(path.read_text()[:100])


def changed(**values):
    def change(path):
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def other_questions(path):
    result = json.loads(path.read_text())
    result["right"]["digits"] += "1"
    path.write_text(json.dumps(result))


def other_rows(path):
    result = json.loads(path.read_text())
    result["rows"]["fact_token"][0][0] += 1
    path.write_text(json.dumps(result))


def lost_task(path):
    result = json.loads(path.read_text())
    del result["right"]["digits"]
    path.write_text(json.dumps(result))


@pytest.mark.parametrize(
    "damage, message",
    [
        (cut_off, "is not a whole result"),
        (changed(experiment=COSINE), "is the result of llava-tiny-vista-cosine, seed 104"),
        (changed(seed=3), "is the result of llava-tiny-vista, seed 3"),
        (changed(cpu="two"), "its cpu is"),
        (changed(instrument="two"), "its instrument is"),
        (changed(rows={}), "is not a whole result"),
        (other_questions, "is of other questions"),
        (other_rows, "is of other questions"),
        (lost_task, "has answers to easyvqa"),
        (lambda path: path.rename(path.with_name("llava-tiny-gpu.json")), "is no run of the plan"),
    ],
)
def test_a_damaged_or_foreign_file_is_named_and_nothing_is_written(primary, damage, message):
    damage(primary / f"results/seed104/{L2}.json")
    with pytest.raises(ResultError) as refused:
        study.write(primary / "study.md", primary)
    assert message in str(refused.value) and str(primary / "results/seed") in str(refused.value)
    assert (primary / "study.md").read_text().endswith("old") and not list(primary.glob("*.svg"))


def test_pilots_tell_how_differences_spread(tmp_path):
    for seed in range(5):
        for name in (BASE, L2):
            result = made(name, seed, lower=3 * seed if name == L2 else 0)
            path = tmp_path / f"seed{seed}/{name}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(result))
    said, _, rows = study.power(study.load(study.PILOT, tmp_path))
    spread = np.std([0, 5, 10, 15, 20], ddof=1)
    assert f"-10.00 points, SD {spread:.2f}" in said
    assert f"| 10 | {statistics.detectable(10) * spread:.2f} |" in rows


def test_a_report_s_run_is_put_inside_the_study_s_spread(primary):
    group = {"baseline": BASE, "paired": {COSINE: {"digits": {"value": -1.23}}}}
    said = study.beside(group, loaded(primary).results)
    assert said == [
        f"{COSINE}: your run's difference on digits is -1.2; over 10 seeds of the study it was -20.0 ± 0.0 (standard "
        "deviation over the seeds)."
    ]
    assert study.beside(group, {}) == []


def test_a_map_shows_the_outline_of_what_is_asked_for():
    mask = np.zeros((1, 64, 64), bool)
    mask[0, 16:32, 32:48] = True
    probe = {"map": np.zeros((1, 4, 4)), "image": np.zeros((1, 64, 64, 3), "uint8"), "question": np.array(["where?"])}
    drawn = figures.maps({"one": probe | {"mask": mask}})
    photo, shown = drawn.axes[:2]
    for axis, scale in ((photo, 16), (shown, 1)):
        points = np.concatenate([path.vertices for path in axis.collections[0].get_paths()])
        assert points.min(0) == pytest.approx(np.array([2, 1]) * scale - 0.5, abs=0.05 * scale)
        assert points.max(0) == pytest.approx(np.array([3, 2]) * scale - 0.5, abs=0.05 * scale)
    assert not figures.maps({"one": probe}).axes[0].collections


def test_the_committed_page_is_what_the_committed_files_give():
    folder = ROOT / study.FOLDER
    text, pictures = study.compose(
        study.load(study.PLAN, folder / "results"), study.load(study.PILOT, folder / "pilot")
    )
    assert (ROOT / study.PAGE).read_text(encoding="utf-8").partition(study.MARK)[2] == f"\n{text}"
    assert {path.stem: path.read_bytes() for path in folder.glob("*.svg")} == pictures
