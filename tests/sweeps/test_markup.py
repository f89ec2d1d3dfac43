"""What is put into a page is text, whatever it contains."""

import pytest

from gpt.sweeps import markup


@pytest.mark.parametrize(
    "hostile", ["<script>alert(1)</script>", "\"><img src=x onerror='alert(1)'>", "</td></table>&lt;"]
)
def test_a_text_stays_a_text_in_every_place(hostile):
    table = markup.table([hostile], [f"<tr>{markup.cell(hostile)}</tr>"])
    for page in (markup.text(hostile), markup.listing([hostile]), markup.cell(hostile), table):
        assert "<script" not in page and "<img" not in page
        assert hostile not in page
    assert not set("<>\"'") & set(markup.text(hostile))  # fit for an attribute in either kind of quotes


def test_control_and_direction_characters_are_shown_and_lines_are_kept_on_demand():
    assert markup.text("a\x1b[31m\u202eb\nc") == "a\\x1b[31m\\u202eb\\nc"
    assert markup.text("a\u202eb\nc", keep_newlines=True) == "a\\u202eb\nc"


def test_a_long_text_keeps_its_begin_and_its_end_and_the_given_length():
    assert markup.shortened("abc", 3) == "abc"
    for longest in (10, 11, 120):
        short = markup.shortened("begin" + "-" * 200 + "end", longest)
        assert len(short) == longest and short.startswith("begi") and short.endswith("end")
    assert len(markup.text("<" * 1000, 100)) == len("&lt;") * 97 + 3  # cut before it is escaped, never inside a code


def test_numbers_stand_to_the_right_and_what_is_not_there_is_an_empty_cell():
    assert markup.cell(0.001) == '<td class="number">0.001</td>'
    assert markup.cell(6.25, 4) == '<td class="number">6.2500</td>'
    assert markup.cell(102400, 0) == '<td class="number">102,400</td>'
    assert markup.cell(True) == "<td>true</td>" and markup.cell("mini") == "<td>mini</td>"
    assert markup.cell(None) == markup.cell(None, 4) == "<td></td>"
