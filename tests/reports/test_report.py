"""Reports: means that are named, seeds that are seeds, and the paper's own numbers."""

import json
import statistics
from types import SimpleNamespace

import pytest
from places import RESULTS

from experiments import report, terminal
from experiments.config import presets, run_config
from experiments.reports import finished, paper, table
from experiments.reports import text as report_text


def write_run(folder, task="cifar100", seed=0, accuracy=0.7, method="snella", **change):
    folder.mkdir(parents=True)
    preset = presets.VTAB.get(task, presets.QUICKSTART)
    values = run_config.as_dict(preset.config) | {"task": task, "seed": seed}
    for name, value in change.items():
        values[method] = values[method] | {name: value}
    result = {
        "test_accuracy": accuracy,
        "best_test_accuracy": accuracy + 0.01,
        "ema_test_accuracy": None,
        "trainable": 1234,
    }
    (folder / "config.json").write_text(json.dumps(values), "utf-8")
    summary = {"task": task, "seed": seed, "methods": {method: result}}
    (folder / "summary.json").write_text(json.dumps(summary), "utf-8")
    return folder


def made(*folders, **options):
    return table.table(finished.collect(folders, terminal.console()), **options)


def test_table_xiii_has_the_means_that_the_paper_prints():
    """It is over the 19 tasks; that of the three groups is about two points higher."""
    assert len(paper.TABLE_XIII) == 20
    for method, tasks in paper.TABLE_XIII.items():
        assert list(tasks) == list(paper.TASKS)
        mean = statistics.mean(tasks.values())
        assert mean == pytest.approx(paper.MEANS[method], abs=0.0501)
    assert set(paper.TASKS) == set(presets.RELEASED_VTAB)
    assert paper.TABLE_XIII["SNELLA-32"]["smallnorb_ele"] == 39.9
    assert paper.TABLE_XIII["linear probe"]["clevr_count"] == 34.3


def test_runs_of_older_versions_are_read():
    """Those of the repository lack fields that came later."""
    results = RESULTS
    table = made(results / "quickstart")
    lora = next(c for c in table["columns"] if c["method"] == "LoRA-8")
    assert lora["tasks"]["digits"]["mean"] == pytest.approx(97.24, abs=0.05)


def test_means_of_groups_and_of_tasks_are_two_things(tmp_path):
    accuracies = {"cifar100": 0.7, "dtd": 0.5, "eurosat": 0.9, "dmlab": 0.4}
    for task, accuracy in accuracies.items():
        write_run(tmp_path / task, task, accuracy=accuracy)
    table = made(tmp_path)
    ours, theirs = table["columns"]
    assert (ours["method"], ours["paper"]) == ("SNELLA-32", False)
    assert ours["groups"] == {
        "natural": pytest.approx(60), "specialized": pytest.approx(90),
        "structured": pytest.approx(40),
    }  # fmt: skip
    assert ours["mean_of_groups"] == pytest.approx(190 / 3)
    assert ours["mean_of_tasks"] == pytest.approx(62.5)
    assert (theirs["method"], theirs["paper"]) == ("SNELLA-32", True)
    own = (74.3, 72.3, 96.5, 53.0)
    assert theirs["mean_of_tasks"] == pytest.approx(statistics.mean(own))
    expected = ((74.3 + 72.3) / 2 + 96.5 + 53.0) / 3
    assert theirs["mean_of_groups"] == pytest.approx(expected)


def test_seeds_have_a_mean_and_a_deviation(tmp_path):
    for seed, accuracy in enumerate((0.70, 0.72, 0.77)):
        write_run(tmp_path / str(seed), "dtd", seed, accuracy)
    (ours, _) = made(tmp_path)["columns"]
    cell = ours["tasks"]["dtd"]
    assert cell["mean"] == pytest.approx(73) and list(cell["seeds"]) == ["0", "1", "2"]
    assert cell["deviation"] == pytest.approx(statistics.stdev((70, 72, 77)))
    best = made(tmp_path, accuracy="best")["columns"][0]["tasks"]["dtd"]
    assert best["mean"] == pytest.approx(74)
    with pytest.raises(ValueError, match="has no ema_test_accuracy of SNELLA-32"):
        made(tmp_path, accuracy="ema")


def test_cells_with_fewer_seeds_say_so(tmp_path):
    for seed, task in ((0, "dtd"), (1, "dtd"), (0, "eurosat")):
        write_run(tmp_path / f"{task}{seed}", task, seed, 0.5 + seed / 10)
    report.main([str(tmp_path), "--out", str(tmp_path / "report")])
    text = (tmp_path / "report/report.md").read_text("utf-8")
    assert "| dtd | 55.0 ± 7.1 | 72.3 |" in text
    assert "| eurosat | 50.0 (1) | " in text
    assert "Seeds: 2 (in parentheses where fewer)." in text


def test_the_papers_numbers_stand_beside_the_same_task_and_method_alone(tmp_path):
    write_run(tmp_path / "a", "dsprites_loc_rerendered")
    write_run(tmp_path / "b", "tuxpaint")
    columns = made(tmp_path)["columns"]
    assert [column["paper"] for column in columns] == [False]
    write_run(tmp_path / "c", "dtd", rank=4)
    assert [c["method"] for c in made(tmp_path / "c")["columns"]] == ["SNELLA-4"]


def test_ones_own_folder_of_a_tasks_name_is_another_task(tmp_path):
    write_run(tmp_path / "a", str(tmp_path / "mine" / "cifar100.csv"))
    table = made(tmp_path)
    assert table["tasks"] == {"cifar100 (own)": "own"}
    assert [column["paper"] for column in table["columns"]] == [False]


def test_there_is_no_mean_without_all_of_its_tasks(tmp_path):
    """Neither of ours, nor of the paper's over the tasks that we have."""
    write_run(tmp_path / "a", "dtd", accuracy=0.9)
    for task in ("dtd", "cifar100", "eurosat"):
        write_run(tmp_path / task, task, method="lora")
    write_run(tmp_path / "d", "eurosat", method="bias")
    columns = {(c["method"], c["paper"]): c for c in made(tmp_path)["columns"]}
    ours, theirs = columns["LoRA-8", False], columns["LoRA-8", True]
    assert ours["mean_of_tasks"] == ours["mean_of_groups"] == pytest.approx(70)
    known = paper.TABLE_XIII["LoRA-8"]
    natural = (known["dtd"] + known["cifar100"]) / 2
    groups = {"natural": natural, "specialized": known["eurosat"]}
    assert theirs["groups"] == pytest.approx(groups)
    for paper_too in (False, True):
        some = columns["SNELLA-32", paper_too]
        assert some["tasks"].keys() == {"dtd"} and not some["groups"]
        assert some["mean_of_tasks"] is some["mean_of_groups"] is None
    bias = columns["Bias", False]
    assert bias["groups"] == {"specialized": pytest.approx(70)}
    assert "no mean without all of its tasks" in report_text.caption(made(tmp_path))


def test_parameters_that_differ_between_tasks_are_a_range(tmp_path):
    for task, count in (("dtd", 1234), ("eurosat", 987)):
        folder = write_run(tmp_path / task, task, method="lora")
        summary = json.loads((folder / "summary.json").read_text("utf-8"))
        summary["methods"]["lora"]["trainable"] = count
        (folder / "summary.json").write_text(json.dumps(summary), "utf-8")
    table = made(tmp_path)
    assert table["columns"][0]["trainable"] == [987, 1234]
    assert "| trainable | 987 to 1,234 |" in report_text.markdown(table)


def test_seeds_may_have_looked_at_other_rounds(tmp_path):
    """Which only the best of the rounds depends on."""
    for seed, every in enumerate((5, 10)):
        folder = write_run(tmp_path / str(seed), seed=seed)
        config = json.loads((folder / "config.json").read_text("utf-8"))
        config["eval_every"] = every
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
    assert len(made(tmp_path)["columns"][0]["tasks"]["cifar100"]["seeds"]) == 2
    with pytest.raises(ValueError, match="differ in eval_every: report them"):
        made(tmp_path, accuracy="best")


def test_runs_that_are_no_seeds_of_one_another_are_refused(tmp_path):
    write_run(tmp_path / "a", seed=0)
    write_run(tmp_path / "b", seed=1, lr=0.5)
    with pytest.raises(ValueError, match=r"but differ in snella\.lr: report them"):
        made(tmp_path)
    write_run(tmp_path / "c", seed=0)
    with pytest.raises(ValueError, match="two runs of SNELLA-32 on cifar100 with seed"):
        made(tmp_path / "a", tmp_path / "c")
    with pytest.raises(ValueError, match="There is no finished run"):
        made(tmp_path / "nowhere")


def test_a_final_run_with_what_a_search_chose_is_its_seed(tmp_path):
    """Another rate is another column."""

    def change(folder, chosen=None, **values):
        for name, new in (("config", values), ("summary", chosen)):
            path = folder / f"{name}.json"
            own = json.loads(path.read_text("utf-8"))
            if name == "config":
                own |= new
            elif new:
                own["methods"]["snella"]["settings"] = new
            path.write_text(json.dumps(own), "utf-8")

    change(write_run(tmp_path / "a"), {"lr": 0.5}, search=True, protocol="choose")
    for seed, lr in ((1, 0.5), (2, 0.25)):
        change(write_run(tmp_path / f"{seed}", seed=seed, lr=lr), protocol="final")
    searched, other = sorted(
        made(tmp_path)["columns"][:2],
        key=lambda column: "searched" not in column["setup"],
    )
    assert list(searched["tasks"]["cifar100"]["seeds"]) == ["0", "1"]
    assert list(other["tasks"]["cifar100"]["seeds"]) == ["2"]


def test_settings_of_a_searched_run_are_those_that_it_tested():
    """Of questions there is one protocol, which is no setting."""

    def chosen(**settings):
        run = SimpleNamespace(settings=settings, result={"settings": {"lr": 0.5}})
        return finished._chosen(run)

    plain = {"lora.lr": 0.5, "search": False}
    assert chosen(**{"lora.lr": 0.1}, search=True) == plain
    assert chosen(**{"lora.lr": 0.1}, search=True, protocol="choose") == {
        **plain, "protocol": "final"
    }  # fmt: skip


def test_folders_without_a_run_are_left_out_and_named(tmp_path, capsys):
    write_run(tmp_path / "a", "dtd")
    (tmp_path / "show").mkdir()
    report.main([str(tmp_path / "a"), str(tmp_path / "show")])
    printed = capsys.readouterr().out
    assert f"left out {tmp_path / 'show'}, where there is no finished run" in printed
    assert "dtd" in printed
    with pytest.raises(SystemExit, match=r"no finished run .* in any folder"):
        report.main([str(tmp_path / "show")])


def test_many_methods_on_few_tasks_are_rows(tmp_path):
    for method in ("full", "lora", "snella"):
        write_run(tmp_path / method, "dtd", method=method)
    out = tmp_path / "report"
    report.main([str(tmp_path), "--out", str(out)])
    lines = (out / "report.md").read_text("utf-8").splitlines()
    assert (
        lines[0] == "|  | dtd | trainable |" and lines[2] == "| Full | 70.0 | 1,234 |"
    )
    assert "| SNELLA-32 (paper) | 72.3 |  |" in lines


def test_a_run_that_is_named_twice_counts_once(tmp_path):
    folder = write_run(tmp_path / "a")
    cell = made(folder, tmp_path)["columns"][0]["tasks"]["cifar100"]
    assert len(cell["seeds"]) == 1


def test_the_command_prints_and_writes(tmp_path, capsys):
    for seed in range(2):
        write_run(tmp_path / f"runs/{seed}", "dtd", seed, 0.5 + seed / 10)
        write_run(tmp_path / f"runs/e{seed}", "eurosat", seed, 0.8)
    out = tmp_path / "new" / "report"
    value = report.main([str(tmp_path / "runs"), "--out", str(out)])
    assert json.loads((out / "report.json").read_text("utf-8")) == value
    text = (out / "report.md").read_text("utf-8")
    assert "| dtd | 55.0 ± 7.1 | 72.3 |" in text
    assert "| mean, natural (1) | 55.0 | 72.3 |" in text
    assert "| mean of groups | 67.5 | 84.4 |" in text
    assert "Test accuracy of the last epoch, %." in text and "Seeds: 2." in text
    assert "mean of tasks" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="There is no finished run"):
        report.main([str(tmp_path / "new")])


def write_error(folder, error, seed=0):
    """A run of an objective whose metric is no share, and for which less is better."""
    write_run(folder, "cifar100", seed)
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    metric = {"name": "error", "more_is_better": False, "percent": False}
    result = {"test_error": error, "best_test_error": error - 1, "trainable": 7}
    summary |= {"metrics": [metric], "methods": {"snella": result}}
    (folder / "summary.json").write_text(json.dumps(summary), "utf-8")


def test_a_table_shows_the_metric_of_its_runs(tmp_path):
    """It is not in percent, and stands without the paper's accuracies."""
    write_error(tmp_path / "a", 12.5)
    write_error(tmp_path / "b", 13.5, seed=1)
    table = made(tmp_path)
    (column,) = table["columns"]
    assert column["tasks"]["cifar100"]["mean"] == 13.0
    assert made(tmp_path, accuracy="best")["columns"][0]["mean_of_tasks"] == 12.0
    text = report_text.markdown(table)
    assert "| cifar100 | 13 ± 0.7071 |" in text
    assert "Test error of the last epoch." in text and "%" not in text
    write_run(tmp_path / "c", "cifar100", seed=2)
    with pytest.raises(ValueError, match="has accuracy: report them separately"):
        made(tmp_path)


def test_a_seed_of_before_a_setting_is_one_of_after(tmp_path):
    """A config that lacks a field had its default."""
    for seed in (0, 1):
        write_run(tmp_path / str(seed), "dtd", seed)
    config = json.loads((tmp_path / "0/config.json").read_text("utf-8"))
    del config["schedule"], config["steps"], config["clip"]
    (tmp_path / "0/config.json").write_text(json.dumps(config), "utf-8")
    assert list(made(tmp_path)["columns"][0]["tasks"]["dtd"]["seeds"]) == ["0", "1"]
