import pytest

from consistency_lens.plots.chart import Chart, Dot, Dots, Line, Lines, Mark, domain_of, num_columns, placed_marks


def panel(*marks):
    return Lines("a", "x", "y", [Line("a", [0, 100], [1, 2])], marks=[Mark(label, x) for label, x in marks])


class TestMarks:
    def test_labels_with_room_stand_in_one_row(self):
        placed = placed_marks(panel(("warm start", 0), ("gumbel", 50)), character=0.02)
        assert [(of.row, of.is_left) for of in placed] == [(0, False), (0, False)]

    def test_one_that_would_run_out_ends_at_its_mark(self):
        placed = placed_marks(panel(("warm start", 0), ("policy gradient", 90)), character=0.02)
        assert [(of.row, of.is_left) for of in placed] == [(0, False), (0, True)]

    def test_one_that_would_cover_another_stands_above_it(self):
        placed = placed_marks(panel(("warm start", 0), ("gumbel", 60), ("policy gradient", 80)), character=0.02)
        assert [of.row for of in placed] == [0, 0, 1]
        assert [of.row for of in placed_marks(panel(("a" * 10, 1), ("b" * 10, 2), ("c" * 10, 3)), 0.02)] == [0, 1, 2]


@pytest.mark.parametrize(("panels", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (5, 3), (8, 3)])
def test_panels_stand_in_an_even_grid(panels, columns):
    assert num_columns(Chart("", [panel()] * panels)) == columns


def test_a_domain_has_room_for_intervals_and_zero():
    rows = [Dot("a", 2.0, (1.0, 3.0)), Dot("b", 4.0)]
    low, high = domain_of(Dots("", "", rows))
    assert 0 < low < 1 and high > 4
    assert domain_of(Dots("", "", rows, zero=True))[0] == 0
    assert domain_of(Dots("", "", rows, domain=(2.5, 3))) == (2.5, 3)
