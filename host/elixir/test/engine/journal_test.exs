defmodule Bridge.JournalTest do
  # What is found again when a command runs again, and what it means if it is not.
  use ExUnit.Case, async: true

  alias Bridge.{Error, Journal}

  defp tool(name, args \\ [], seq \\ nil), do: {"tool.call", seq, %{"name" => name, "args" => args}, []}
  defp get(name, seq), do: {"session.get", seq, %{"name" => name}, []}

  # Whether it was found again; recorded otherwise.
  defp ask(journal, {method, seq, params, buffers}, effect \\ true) do
    asked = Journal.asked(method, params)

    case Journal.match(journal, seq, method, asked, Journal.digest(method, asked, buffers)) do
      {:ok, journal, nil, _forgotten} ->
        {journal, _entry} = Journal.record(journal, seq, method, asked, buffers, effect and method == "tool.call")
        {false, journal}

      {:ok, journal, _entry, []} ->
        {true, journal}

      {:error, error} ->
        {error, journal}
    end
  end

  defp first_attempt(callbacks, effect \\ true) do
    journal =
      Enum.reduce(callbacks, Journal.begin(Journal.new([], false)), fn callback, journal ->
        {false, journal} = ask(journal, callback, effect)
        journal
      end)

    Journal.begin(journal)
  end

  defp found(journal, callbacks), do: Enum.map_reduce(callbacks, journal, &ask(&2, &1))

  test "the same callbacks are found again, whatever the command is called this time" do
    {"tool.call", 2, params, []} = tool("pay", [3], 2)
    journal = first_attempt([get("x", 1), tool("pay", [3], 2)])
    again = {"tool.call", 2, Map.merge(params, %{"command" => 77, "kwargs" => nil}), []}
    {[true, true, false], journal} = found(journal, [get("x", 1), again, tool("pay", [4], 3)])
    assert Journal.check_complete(journal) == :ok
  end

  test "two calls alike are two calls" do
    journal = first_attempt([tool("pay", [3]), tool("pay", [3])])
    assert {[true, true, false], _} = found(journal, List.duplicate(tool("pay", [3]), 3))
  end

  test "the buffers are part of what is asked" do
    keep = fn buffer -> {"tool.call", nil, %{"name" => "keep", "args" => [0]}, [buffer]} end
    {[false], journal} = [keep.("one")] |> first_attempt() |> found([keep.("two")])
    assert {:error, %Error{name: :replay_diverged}} = Journal.check_complete(journal)
  end

  test "one and 1.0, and members in another order, are told apart as JSON does" do
    digest = &Journal.digest("tool.call", &1, [])
    assert digest.(["f", [1], %{}]) != digest.(["f", [1.0], %{}])
    assert digest.(["f", [], Map.new(1..40, &{"k#{&1}", &1})]) == digest.(["f", [], Map.new(40..1, &{"k#{&1}", &1})])
  end

  test "callbacks of other threads may come in any order" do
    journal = first_attempt([tool("a"), tool("b"), tool("c")])
    {[true, false, true, true], journal} = found(journal, Enum.map(~w(c d a b), &tool/1))
    assert Journal.check_complete(journal) == :ok
  end

  test "another request in the place of a tool's call is a divergence that names both" do
    {[true], journal} = [get("x", 1), tool("pay", [3], 2)] |> first_attempt() |> found([get("x", 1)])
    {%Error{name: :replay_diverged} = error, _} = ask(journal, tool("pay", [4], 2))
    assert error.message =~ ~r/was tool pay\(3\).*was tool pay\(4\)/
  end

  test "of a command that has secrets an error shows no argument" do
    journal = Journal.begin(Journal.new([], true))
    {false, journal} = ask(journal, tool("pay", ["sk-1"], 1), true)
    {%Error{name: :replay_diverged} = error, _} = journal |> Journal.begin() |> ask(tool("pay", ["sk-2"], 1))
    assert error.message =~ ~r/was tool pay\(…\).*was tool pay\(…\)/
  end

  test "a tool that is called before one whose effect has happened is a divergence" do
    assert {%Error{name: :replay_diverged}, _} = [tool("pay", [3], 5)] |> first_attempt() |> ask(tool("mail", [], 4))
  end

  test "an effect that was passed over is noticed before the next tool runs" do
    # The second time a write has taken the first place.
    {error, _} = [tool("pay", ["A"], 1)] |> first_attempt() |> ask(tool("pay", ["B"], 2))
    assert error.message =~ ~r/was tool pay\("A"\).*was tool pay\("B"\)/
  end

  test "another way that forgets only readings does no harm" do
    journal = first_attempt([get("x", 1), get("y", 2), get("z", 3)])
    {true, journal} = ask(journal, get("x", 1))
    digest = Journal.digest("session.get", ["q"], [])
    assert {:ok, journal, nil, [2, 3]} = Journal.match(journal, 2, "session.get", ["q"], digest)
    assert {false, journal} = ask(journal, get("z", 3))
    assert Journal.check_complete(journal) == :ok
  end

  test "another way around an idempotent tool is allowed" do
    {false, journal} = [tool("look", [1], 1)] |> first_attempt(false) |> ask(tool("look", [2], 1), false)
    assert Journal.check_complete(journal) == :ok
  end

  test "an end without a call whose effect has happened is a divergence" do
    for seq <- [nil, 1] do
      assert {:error, %Error{name: :replay_diverged} = error} =
               [tool("pay", [3], seq)] |> first_attempt() |> Journal.check_complete()

      assert error.message =~ ~r/called tool pay\(3\).*ended without/
    end
  end

  test "a journal that is full says so and holds no more; an effect that is not in it counts all the more" do
    asked = Journal.asked("session.get", %{"name" => "x"})
    record = fn n, journal -> journal |> Journal.record(n, "session.get", asked, [], false) |> elem(0) end
    journal = Enum.reduce(1..100_000, Journal.new([], false), record)
    refute journal.overflowed
    journal = record.(100_001, journal)
    assert {journal.overflowed, Journal.count(journal), journal.effects} == {true, 100_000, false}
    {journal, entry} = Journal.record(journal, nil, "tool.call", ["pay", [], %{}], [], true)
    assert journal.effects
    assert Journal.put(journal, %{entry | reply: {:ok, "1", []}}) == journal
  end

  test "what an error shows of a callback is bounded" do
    asked = ["pay", [String.duplicate("x", 10_000)], %{}]
    {_journal, entry} = Journal.record(Journal.new([], false), 1, "tool.call", asked, [], true)
    text = Journal.shown(entry)
    assert String.length(text) == 301
  end
end
