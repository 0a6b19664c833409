defmodule Bridge.Pool.BreakerTest do
  use ExUnit.Case, async: true

  alias Bridge.Pool.Breaker

  @s 1_000_000

  defp new(settings \\ %{}), do: Breaker.new(settings)

  # One call of `command` on `kernel` that ends so.
  defp call(breaker, kernel, command, outcome, now) do
    {breaker, probe} = Breaker.begin(breaker, kernel, command)
    Breaker.finish(breaker, kernel, command, outcome, probe, now)
  end

  defp calls(breaker, list) do
    Enum.reduce(list, {breaker, []}, fn {kernel, command, outcome, now}, {breaker, all} ->
      {breaker, changes} = call(breaker, kernel, command, outcome, now)
      {breaker, all ++ changes}
    end)
  end

  test "a command is held back after five kernels died of it, and not by other commands" do
    {breaker, changes} = calls(new(), for(n <- 1..4, do: {"k#{n}", "f", :died, 0}))
    assert changes == []
    assert Breaker.check(breaker, "f", 0) == :ok
    {breaker, [change]} = call(breaker, "k5", "f", :died, 0)
    assert %{opened: true, command: "f", kernel: "", failures: 5, cooldown_us: 10_000_000, reason: "died"} = change
    assert {:error, %Bridge.Error{name: :circuit_open, message: message}} = Breaker.check(breaker, "f", 0)
    assert message =~ "f failed its kernels 5 times in a row"
    assert message =~ "10 s more"
    assert Breaker.check(breaker, "g", 0) == :ok
  end

  test "one death is one failure, however many calls were in flight there" do
    {breaker, changes} = calls(new(), List.duplicate({"k1", "f", :died, 0}, 50))
    assert changes == []
    assert Breaker.check(breaker, "f", 0) == :ok
  end

  test "a kernel that lets three deadlines pass is left alone by that command, which may go elsewhere" do
    {breaker, changes} = calls(new(), List.duplicate({"k1", "f", :timeout, 0}, 3))
    assert [%{opened: true, kernel: "k1", reason: "timeout"}] = changes
    refute Breaker.admits?(breaker, "k1", "f", 0)
    assert Breaker.admits?(breaker, "k2", "f", 0)
    assert Breaker.admits?(breaker, "k1", "g", 0)
    assert Breaker.check(breaker, "f", 0) == :ok
  end

  for sign <- [:ok, :error, :refused] do
    test "failures in a row are counted: #{sign} is a sign of life that begins anew" do
      {breaker, changes} =
        calls(new(), for(_ <- 1..10, outcome <- [:timeout, :timeout, unquote(sign)], do: {"k", "f", outcome, 0}))

      assert changes == []
      assert Breaker.size(breaker) == 0
    end
  end

  test "when the time is over one is tried, and the others wait for what becomes of it" do
    {breaker, _} = calls(new(%{command_failures: 1}), [{"k1", "f", :died, 0}])
    assert {:error, _} = Breaker.check(breaker, "f", 10 * @s - 1)
    assert :ok = Breaker.check(breaker, "f", 10 * @s)
    {breaker, true} = Breaker.begin(breaker, "k2", "f")
    assert {:error, %{message: message}} = Breaker.check(breaker, "f", 11 * @s)
    assert message =~ "one is tried now"
    {closed, changes} = Breaker.finish(breaker, "k2", "f", :ok, true, 12 * @s)
    assert [%{opened: false, kernel: "", reason: "ok"}] = changes
    assert Breaker.check(closed, "f", 12 * @s) == :ok
    {again, [%{opened: true, cooldown_us: 20_000_000}]} = Breaker.finish(breaker, "k2", "f", :died, true, 12 * @s)
    assert {:error, _} = Breaker.check(again, "f", 31 * @s)
    assert :ok = Breaker.check(again, "f", 32 * @s)
  end

  test "a probe that is cancelled decides nothing: the next one may try" do
    {breaker, _} = calls(new(%{command_failures: 1}), [{"k1", "f", :died, 0}])
    {breaker, true} = Breaker.begin(breaker, "k2", "f")
    {breaker, []} = Breaker.finish(breaker, "k2", "f", :cancelled, true, 12 * @s)
    assert :ok = Breaker.check(breaker, "f", 12 * @s)
    assert {_, true} = Breaker.begin(breaker, "k2", "f")
  end

  test "the time doubles with each failed probe, up to five minutes" do
    {breaker, _} = calls(new(%{command_failures: 1}), [{"k0", "f", :died, 0}])

    {_, _, cooldowns} =
      Enum.reduce(1..8, {breaker, 0, []}, fn n, {breaker, now, cooldowns} ->
        now = now + 301 * @s
        {breaker, [%{cooldown_us: us}]} = call(breaker, "k#{n}", "f", :died, now)
        {breaker, now, [div(us, @s) | cooldowns]}
      end)

    assert Enum.reverse(cooldowns) == [20, 40, 80, 160, 300, 300, 300, 300]
  end

  test "what was sent before it opened says nothing new" do
    {breaker, [_]} = calls(new(%{command_failures: 1, kernel_failures: 1_000}), [{"k1", "f", :died, 0}])
    {_, []} = Breaker.finish(breaker, "k2", "f", :died, false, 1)
  end

  test "errors of a command's own code count by their rate, if that is asked for" do
    {_, none} = calls(new(), List.duplicate({"k", "f", :error, 0}, 100))
    assert none == []
    settings = %{error_rate: 0.5, error_window: 4}
    {breaker, [change]} = calls(new(settings), for(o <- [:error, :ok, :error, :ok], do: {"k", "f", o, 0}))
    assert %{opened: true, kernel: "", failures: 2, reason: "error rate 0.5 of the last 4"} = change
    assert {:error, %{message: message}} = Breaker.check(breaker, "f", 0)
    assert message =~ "fails too often"
    # Only one that goes well closes it.
    {breaker, []} = call(breaker, "k", "f", :refused, 10 * @s)
    assert {:ok, {breaker, true}} = {Breaker.check(breaker, "f", 10 * @s), Breaker.begin(breaker, "k", "f")}
    {breaker, [%{opened: false}]} = Breaker.finish(breaker, "k", "f", :ok, true, 10 * @s)
    assert Breaker.size(breaker) == 0
  end

  test "with a kernel its circuits go, those of the command over all kernels stay" do
    {breaker, _} = calls(new(), List.duplicate({"k1", "f", :timeout, 0}, 3))
    assert Breaker.size(breaker) == 2
    breaker = Breaker.forget(breaker, "k1")
    assert Breaker.size(breaker) == 1
  end

  test "what is known of commands is bounded" do
    {breaker, _} = calls(new(%{error_rate: 1.0}), for(n <- 1..5_000, do: {"k", "f#{n}", :timeout, 0}))
    assert Breaker.size(breaker) == 4_096
  end

  test "none at all lets everything through" do
    assert Breaker.new(nil) == nil
    {nil, []} = calls(nil, for(n <- 1..50, do: {"k#{n}", "f", :died, 0}))
    assert Breaker.check(nil, "f", 0) == :ok
    assert Breaker.admits?(nil, "k", "f", 0)
  end

  test "whatever happens, a circuit is open or probing only after failures, and a success by its probe ends that" do
    for seed <- 1..50 do
      Enum.reduce(1..300, {new(%{error_rate: 0.6, error_window: 5}), 0, :rand.seed_s(:exsss, seed)}, fn _,
                                                                                                        {b, now, rand} ->
        {k, rand} = :rand.uniform_s(3, rand)
        {o, rand} = :rand.uniform_s(6, rand)
        {passed, rand} = :rand.uniform_s(5 * @s, rand)
        now = now + passed
        outcome = Enum.at([:ok, :error, :refused, :died, :timeout, :cancelled], o - 1)

        case Breaker.check(b, "f", now) do
          :ok ->
            {b, probe} = Breaker.begin(b, "k#{k}", "f")
            {b, changes} = Breaker.finish(b, "k#{k}", "f", outcome, probe, now)
            if outcome == :ok and probe, do: assert(Breaker.check(b, "f", now) == :ok)

            for change <- changes,
                do: assert(not change.opened or outcome in [:died, :timeout] or change.reason =~ "error rate")

            {b, now, rand}

          {:error, %Bridge.Error{name: :circuit_open}} ->
            assert Breaker.check(b, "f", now + 300 * @s) == :ok
            {b, now, rand}
        end
      end)
    end
  end

  test "settings that make no sense are named" do
    assert Breaker.problem(%{kernel_failures: 1, cooldown: 300_000, error_rate: 0.5, error_window: 1_000}) == nil

    for {settings, says} <- [
          {%{kernel_failures: 0}, "kernel_failures"},
          {%{command_failures: 1.5}, "command_failures"},
          {%{cooldown: 300_001}, "milliseconds"},
          {%{error_rate: 0}, "share"},
          {%{error_window: 1_001}, "1000"},
          {%{failures: 3}, ":failures"}
        ] do
      assert Breaker.problem(settings) =~ says
    end
  end
end
