"""What driver and trials say to each other goes through Ray Tune's dictionaries and back."""

from slimfront.trainables.messages import NetworkReport, Report, TrialOrder


def test_an_order_is_read_back_from_a_config_that_has_more() -> None:
    order = TrialOrder(
        candidate={"training": {"epochs": 2}},
        resources={"CPU": 1.0},
        number=3,
        values={"training.lr": 0.1},
        processes=2,
        report_at=(1, 3),
        resume_from="somewhere",
        front=[{"val_accuracy": 0.9, "params": 12.0}],
        session="s-1",
    )
    assert TrialOrder.of(order.as_config() | {"of Ray": 1}) == order
    assert order.as_config()["report_at"] == [1, 3]  # plain data alone


def test_a_report_is_read_back_from_a_result_that_has_more() -> None:
    measures = {"val_accuracy": 0.9, "params": 12.0, "layers_merged": 1.0}
    report = Report(
        [{"epoch": 1, "lr": 0.1}],
        epoch=1,
        network=NetworkReport(measures, [["1", "removed", "2 units"]]),
        pruned=(NetworkReport({"val_accuracy": 0.8, "params": 6.0}, [], step=2),),
        finished=True,
    )
    result = report.as_result()
    assert (result["done"], result["val_accuracy"], result["params"]) == (True, 0.9, 12.0)
    assert Report.of(result | {"training_iteration": 7, "time_total_s": 1.0}) == report


def test_a_failure_has_no_network_and_ends_the_trial() -> None:
    report = Report([], failure="it diverged")
    assert report.as_result() == {"history": [], "failure": "it diverged", "done": True}
    assert Report.of(report.as_result()) == report
    assert Report.of({}) == Report([])
