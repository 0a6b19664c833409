defmodule Bridge.Live.LineTest do
  use ExUnit.Case, async: true

  alias Bridge.Live.{Line, Summary, Words}

  doctest Line
  doctest Summary

  # Cases by chance, and what the Python host makes of them.
  @python """
  import json, random
  from bridge_kernel.contract.line import Line, Summary, duration
  chance = random.Random(5)
  texts = ["", "f", "dspy.Predict.__call__", "a\\nb\\t c\\x1b[2J", "<b>&\\"'</b>", "é\\u200b東京 \\u00a0x", "x" * 119, "x" * 120,
           "x" * 121, "y" * 5000, "🦊" * 130, "  lead  ", "\\u2028" * 700]
  ns = [0, 1, 999, 500, 1500, 2500, 999_499, 999_500, 999_999, 1_000_000, 1_050_000, 1_150_000, 1_250_000, 99_949_999, 99_950_000,
        99_999_999, 10**8, 100_500_000, 101_500_000, 150_000_000, 250_000_000, 350_000_000, 10**9 - 1, 10**9, 1_005_000_000,
        1_015_000_000, 119_999_999_999, 120 * 10**9, 123_456_789_012_345]
  numbers = [None, 0, 1, 3, 10, 0.5, 0.1, 2.5, 1e-5, 123456, 1234567, 999999.5, 12345.678, 1e22, 100000.0, 0.0001234567, -2.5]
  def a_line():
      pick = chance.choice
      said = dict(subject=pick(texts), elapsed=pick(ns + [chance.randrange(10**11)]), state=pick(["queued", "running", "ok", "error"]),
          kernel=pick(["", "e4a50daae3", "k1"]), queue=pick([0, 9_999_999, 10_000_000, 412_000_000]), callbacks=pick([0, 1, 2, 1234]),
          lm_calls=pick([0, 1, 2]), tokens=pick([0, 1, 12000, 1234567]), attempt=pick([0, 1, 2]), done=pick(numbers),
          total=pick(numbers[:-1]), message=pick(texts), cached=pick([True, False]), error=pick(["", "ValueError", texts[3], "z" * 400]),
          traceback=pick(["", "Traceback\\n  <x>"]))
      return said
  def a_summary():
      pick = chance.choice
      return dict(ok=pick([0, 1, 1200]), failed=pick([0, 1, 1000]), running=pick([0, 3]), p50=pick([None, 1_250_000]),
          p95=pick([None, 12_345_678]), lm_calls=pick([0, 1]), tokens=pick([0, 1, 99999]), elapsed=pick(ns))
  lines = [a_line() for _ in range(1500)]
  summaries = [a_summary() for _ in range(300)]
  print(json.dumps({
      "durations": [[n, duration(n)] for n in ns + [chance.randrange(10**k) for k in range(1, 15) for _ in range(60)]],
      "lines": [[s, Line(**s).text(), Line(**s).html()] for s in lines],
      "summaries": [[s, Summary(**s).text(), Summary(**s).html()] for s in summaries],
  }))
  """

  setup_all do
    {printed, 0} = System.cmd(Bridge.TestKernels.python(), ["-c", @python])
    {:ok, cases} = Bridge.JSON.decode(printed)
    {:ok, cases: cases}
  end

  @states %{"queued" => :queued, "running" => :running, "ok" => :ok, "error" => :error}

  defp as(module, said) do
    known = module.__struct__() |> Map.from_struct() |> Map.keys()
    said = for key <- known, is_map_key(said, to_string(key)), do: {key, said[to_string(key)]}
    said = if said[:state], do: Keyword.update!(said, :state, &@states[&1]), else: said
    struct!(module, said)
  end

  test "a duration is written as Python writes it, ties included", %{cases: cases} do
    assert length(cases["durations"]) > 800
    for [ns, text] <- cases["durations"], do: assert({ns, Words.duration(ns)} == {ns, text})
  end

  test "a command's line is the Python host's, to the character, as text and as HTML", %{cases: cases} do
    assert length(cases["lines"]) == 1500

    for [said, text, html] <- cases["lines"] do
      line = as(Line, said)
      assert {said, Line.text(line)} == {said, text}
      assert {said, Line.html(line)} == {said, html}
    end
  end

  test "the line of many commands is the Python host's", %{cases: cases} do
    assert length(cases["summaries"]) == 300

    for [said, text, html] <- cases["summaries"] do
      summary = as(Summary, said)
      assert {said, Summary.text(summary)} == {said, text}
      assert {said, Summary.html(summary)} == {said, html}
    end
  end
end
