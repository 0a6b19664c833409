defmodule Bridge.Pool.DeskTest do
  use ExUnit.Case, async: true

  alias Bridge.Pool.Desk

  @ask %{session: "s", subject: "f"}

  defp new(opts \\ []) do
    defaults = %{concurrency: 2, queue: 100, routing: :least_loaded, breaker: %{}, recycle: %{}, seed: 1}
    Desk.new(Map.merge(defaults, Map.new(opts)))
  end

  defp with_kernels(desk, ids, most \\ 64) do
    Enum.reduce(ids, desk, fn id, desk ->
      {desk, _} = Desk.join(desk, %{id: id, pid: self(), os_pid: 1, most: most}, 0)
      desk
    end)
  end

  defp checkout(desk, ref, ask \\ %{}, now \\ 0), do: Desk.checkout(desk, ref, Map.merge(@ask, ask), now)

  # Takes places for all refs, each of which must be granted at once.
  defp fill(desk, refs, ask \\ %{}) do
    Enum.reduce(refs, desk, fn ref, desk ->
      {desk, [{:grant, ^ref, _}]} = checkout(desk, ref, ask)
      desk
    end)
  end

  defp granted(effects), do: for({:grant, ref, grant} <- effects, do: {ref, grant.id})

  test "a command gets a place at once where there is one, and waits where there is none" do
    desk = new() |> with_kernels(["a"])
    desk = fill(desk, [1, 2])
    {desk, []} = checkout(desk, 3, %{}, 1_000)
    assert Desk.waiting(desk) == 1
    {desk, [{:grant, 3, %{id: "a", queue_us: 4_000, pid: pid}}]} = Desk.checkin(desk, 1, :ok, 5_000)
    assert pid == self()
    assert Desk.waiting(desk) == 0
  end

  test "a kernel gets no more than it says it takes, nor more than the pool's concurrency" do
    desk = new(concurrency: 3) |> with_kernels(["a"], 2) |> fill([1, 2])
    assert {_, []} = checkout(desk, 3)
    desk = new(concurrency: 3) |> with_kernels(["a"], 100) |> fill([1, 2, 3])
    assert {_, []} = checkout(desk, 4)
  end

  test "what waits for the first kernel is served when it is there" do
    {desk, []} = checkout(new(), 1)
    {_, effects} = Desk.join(desk, %{id: "a", pid: self(), os_pid: 1, most: 64}, 9)
    assert granted(effects) == [{1, "a"}]
  end

  test "sessions take turns" do
    desk = new(concurrency: 1) |> with_kernels(["a"]) |> fill([:first])
    desk = Enum.reduce(1..3, desk, fn n, desk -> desk |> checkout({"x", n}, %{session: "x"}) |> elem(0) end)
    desk = desk |> checkout({"y", 1}, %{session: "y"}) |> elem(0)

    {order, _, _} =
      Enum.reduce(1..4, {[], :first, desk}, fn _, {order, running, desk} ->
        {desk, [{:grant, ref, _}]} = Desk.checkin(desk, running, :ok, 0)
        {[ref | order], ref, desk}
      end)

    assert Enum.reverse(order) == [{"x", 1}, {"y", 1}, {"x", 2}, {"x", 3}]
  end

  test "who would be one too many is told how long the wait would be" do
    desk = new(concurrency: 1, queue: 4) |> with_kernels(["a"]) |> fill([0])
    {desk, _} = Desk.checkin(desk, 0, :ok, 2_000_000)
    desk = fill(desk, [1])
    {desk, []} = checkout(desk, 2)
    {desk, []} = checkout(desk, 3)
    {desk, [{:fail, 4, error, %{waiting: 2, session_waiting: 2}}]} = checkout(desk, 4)
    assert error.name == :queue_full
    assert error.message == "2 commands wait for a kernel, and 4 may at most: the wait would be about 6.0 s"
    assert {_, []} = checkout(desk, 5, %{session: "other"})
  end

  test "who leaves the line is not served, who leaves its place makes room" do
    desk = new(concurrency: 1) |> with_kernels(["a"]) |> fill([1])
    {desk, []} = checkout(desk, 2)
    {desk, []} = checkout(desk, 3)
    {desk, []} = Desk.withdraw(desk, 2, 0)
    {desk, effects} = Desk.withdraw(desk, 1, 0)
    assert granted(effects) == [{3, "a"}]
    assert {^desk, []} = Desk.withdraw(desk, 1, 0)
    assert {^desk, []} = Desk.checkin(desk, :never, :ok, 0)
  end

  test "a place is given back once, however often that is said" do
    desk = new(concurrency: 1) |> with_kernels(["a"]) |> fill([1])
    {desk, []} = Desk.checkin(desk, 1, :ok, 0)
    {desk, []} = Desk.checkin(desk, 1, :died, 0)
    assert %{in_flight: 0, running: 0, completed: 1} = desk.kernels["a"]
  end

  test "a kernel to avoid is avoided if there is another, else better than none" do
    desk = new() |> with_kernels(["a", "b"])
    {desk, effects} = checkout(desk, 1, %{exclude: ["a"]})
    assert granted(effects) == [{1, "b"}]
    {_, effects} = checkout(desk, 2, %{exclude: ["a", "b"]})
    assert granted(effects) == [{2, "a"}]
  end

  test "a command that is to be alone gets an idle kernel, and no other joins it there" do
    desk = new(concurrency: 8) |> with_kernels(["a", "b"]) |> fill([1])
    {desk, effects} = checkout(desk, :alone, %{alone: true})
    assert [{:alone, id}] = granted(effects)
    {desk, effects} = checkout(desk, 2)
    assert [{2, other}] = granted(effects)
    assert other != id
    {desk, []} = Desk.checkin(desk, :alone, :ok, 0)
    {_, effects} = checkout(desk, 3, %{exclude: [other]})
    assert granted(effects) == [{3, id}]
  end

  test "where none is idle one is kept free for it, and the rest goes on elsewhere" do
    desk = new(concurrency: 8) |> with_kernels(["a", "b"]) |> fill([1, 2])
    {desk, []} = checkout(desk, :alone, %{alone: true})
    assert [reserved] = for({id, kernel} <- desk.kernels, kernel.reserved, do: id)
    {desk, effects} = checkout(desk, 3)
    assert [{3, other}] = granted(effects)
    assert other != reserved
    there = Enum.find([1, 2], &(desk.leases[&1].kernel == reserved))
    {desk, effects} = Desk.checkin(desk, there, :ok, 0)
    assert granted(effects) == [{:alone, reserved}]
    refute desk.kernels[reserved].reserved
  end

  test "two that are to be alone take turns on one kernel, and the queue goes on after them" do
    desk = new(concurrency: 8) |> with_kernels(["a"]) |> fill([1])
    {desk, []} = checkout(desk, :first, %{alone: true})
    {desk, []} = checkout(desk, :second, %{alone: true})
    {desk, []} = checkout(desk, 2)
    {desk, effects} = Desk.checkin(desk, 1, :ok, 0)
    assert granted(effects) == [{:first, "a"}]
    {desk, effects} = Desk.checkin(desk, :first, :ok, 0)
    assert granted(effects) == [{:second, "a"}]
    {_, effects} = Desk.checkin(desk, :second, :ok, 0)
    assert granted(effects) == [{2, "a"}]
  end

  test "who waits to be alone and gives up frees what was kept for it" do
    desk = new(concurrency: 8) |> with_kernels(["a"]) |> fill([1])
    {desk, []} = checkout(desk, :alone, %{alone: true})
    {desk, []} = checkout(desk, 2)
    {desk, effects} = Desk.withdraw(desk, :alone, 0)
    assert granted(effects) == [{2, "a"}]
    refute desk.kernels["a"].reserved
  end

  test "when the kernel that was kept for it dies, another is" do
    desk = new(concurrency: 8) |> with_kernels(["a", "b"]) |> fill([1, 2])
    {desk, []} = checkout(desk, :alone, %{alone: true})
    [reserved] = for {id, kernel} <- desk.kernels, kernel.reserved, do: id
    {desk, []} = Desk.leave(desk, reserved, 0)
    assert [other] = for({id, kernel} <- desk.kernels, kernel.reserved, do: id)
    there = Enum.find([1, 2], &(desk.leases[&1].kernel == other))
    {_, effects} = Desk.checkin(desk, there, :ok, 0)
    assert granted(effects) == [{:alone, other}]
  end

  test "with no kernel at all it waits for one, and loses nothing" do
    desk = new() |> with_kernels(["a"]) |> fill([1])
    {desk, []} = checkout(desk, :alone, %{alone: true})
    {desk, []} = Desk.leave(desk, "a", 0)
    {_, effects} = Desk.join(desk, %{id: "b", pid: self(), os_pid: 1, most: 64}, 0)
    assert granted(effects) == [{:alone, "b"}]
  end

  test "a nested command waits for no place: its outer command would never give one back" do
    desk = new(concurrency: 1) |> with_kernels(["a"]) |> fill([:outer])
    {desk, []} = checkout(desk, 2)
    {desk, effects} = checkout(desk, :nested, %{nested: true})
    assert granted(effects) == [{:nested, "a"}]
    {desk, []} = Desk.checkin(desk, :nested, :ok, 0)
    {_, effects} = Desk.checkin(desk, :outer, :ok, 0)
    assert granted(effects) == [{2, "a"}]
  end

  test "a nested command runs on a kernel that drains, if there is no other" do
    desk = new() |> with_kernels(["a"]) |> fill([:outer])
    {:ok, desk, []} = Desk.drain(desk, "a", 0)
    {_, effects} = checkout(desk, :nested, %{nested: true})
    assert granted(effects) == [{:nested, "a"}]
  end

  test "a kernel that drains gets nothing more and says when it is idle, once" do
    desk = new() |> with_kernels(["a", "b"]) |> fill([1], %{exclude: ["b"]})
    {:ok, desk, []} = Desk.drain(desk, "a", 0)
    {:ok, desk, []} = Desk.drain(desk, "a", 0)
    {desk, effects} = checkout(desk, 2, %{exclude: ["b"]})
    assert granted(effects) == [{2, "b"}]
    assert {desk, [{:drained, %{id: "a"}}]} = Desk.checkin(desk, 1, :ok, 0)
    assert {:ok, _, [{:drained, %{id: "b"}}]} = desk |> Desk.withdraw(2, 0) |> elem(0) |> Desk.drain("b", 0)
    assert Desk.drain(desk, "no", 0) == :error
  end

  test "a kernel that does not answer gets nothing until it does" do
    desk = new() |> with_kernels(["a"])
    {desk, []} = Desk.report(desk, "a", %{unresponsive: true}, 0)
    {desk, []} = checkout(desk, 1)
    {_, effects} = Desk.report(desk, "a", %{unresponsive: false}, 0)
    assert granted(effects) == [{1, "a"}]
  end

  test "a dead kernel's places are still given back, and its command is counted against the circuit" do
    desk = new(breaker: %{command_failures: 1}) |> with_kernels(["a", "b"])
    {desk, [{:grant, 1, %{id: id}}]} = checkout(desk, 1)
    {desk, []} = Desk.leave(desk, id, 0)
    {desk, [{:breaker, %{opened: true, command: "f"}}]} = Desk.checkin(desk, 1, :died, 0)
    assert {desk, [{:fail, 2, %{name: :circuit_open}, nil}]} = checkout(desk, 2)
    assert {_, [{:grant, 3, _}]} = checkout(desk, 3, %{subject: "g"})
  end

  test "who waits is told when the circuit has opened meanwhile" do
    desk = new(concurrency: 1, breaker: %{command_failures: 1}) |> with_kernels(["a"]) |> fill([1])
    {desk, []} = checkout(desk, 2)
    {desk, []} = checkout(desk, 3, %{subject: "g"})
    {_, effects} = Desk.checkin(desk, 1, :deadline, 0)
    assert [{:breaker, _}, {:fail, 2, %{name: :circuit_open}, nil}, {:grant, 3, _}] = effects
  end

  test "an error that is the caller's own says nothing of the command" do
    desk = new(breaker: %{error_rate: 0.1, error_window: 2}) |> with_kernels(["a"])

    desk =
      Enum.reduce(1..9, desk, fn n, desk ->
        {desk, []} = desk |> fill([n]) |> Desk.checkin(n, {:error, :invalid_params}, 0)
        desk
      end)

    desk = fill(desk, [:x])
    {desk, []} = Desk.checkin(desk, :x, {:error, :remote_error}, 0)
    assert {_, [{:breaker, %{opened: true}}]} = desk |> fill([:y]) |> Desk.checkin(:y, {:error, :remote_error}, 0)
  end

  test "a kernel is worn after so many commands, and its owner is told once" do
    desk = new(recycle: %{commands: 2}) |> with_kernels(["a"]) |> fill([1, 2])
    {desk, []} = Desk.checkin(desk, 1, :ok, 0)
    {desk, [{:recycle, %{id: "a"}, "commands"}]} = Desk.checkin(desk, 2, :ok, 0)
    {_, []} = desk |> fill([3]) |> Desk.checkin(3, :ok, 0)
  end

  test "kernels are worn one at a time, by memory and by age as well" do
    desk = new(recycle: %{rss_bytes: 100, age: 1_000}) |> with_kernels(["a", "b"])
    {desk, []} = Desk.report(desk, "a", %{rss: 100}, 0)
    {desk, [{:recycle, %{id: "a"}, "rss"}]} = Desk.report(desk, "a", %{rss: 101}, 0)
    {desk, []} = Desk.report(desk, "b", %{rss: 101}, 0)
    {desk, []} = Desk.leave(desk, "a", 0)
    {desk, [{:recycle, %{id: "b"}, "rss"}]} = Desk.tick(desk, 0)
    desk = desk |> Desk.leave("b", 0) |> elem(0) |> with_kernels(["c"])
    {desk, []} = Desk.tick(desk, 899_999)
    assert {_, [{:recycle, %{id: "c"}, "age"}]} = Desk.tick(desk, 1_100_001)
  end

  test "when no kernel will ever be ready, who waits is told why, and so is who comes" do
    error = Bridge.Error.new(:kernel_start_failed, "no Python")
    {desk, []} = checkout(new(), 1)
    {desk, [{:fail, 1, ^error, nil}]} = Desk.set_hopeless(desk, error)
    {desk, [{:fail, 2, ^error, nil}]} = checkout(desk, 2)
    {desk, []} = Desk.set_hopeless(desk, nil)
    assert {_, []} = checkout(desk, 3)
  end

  test "as long as a kernel is there, nothing is hopeless; when the last one goes, it is" do
    error = Bridge.Error.new(:kernel_start_failed)
    desk = new(concurrency: 1) |> with_kernels(["a"]) |> fill([1])
    {desk, []} = Desk.set_hopeless(desk, error)
    {desk, []} = checkout(desk, 2)
    assert {_, [{:fail, 2, ^error, nil}]} = Desk.leave(desk, "a", 0)
  end

  test "a closed desk gives nothing out and takes everything back" do
    desk = new(concurrency: 1) |> with_kernels(["a"]) |> fill([1])
    {desk, []} = checkout(desk, 2)
    {desk, []} = checkout(desk, 3, %{alone: true})
    {desk, effects} = Desk.close(desk)
    assert [2, 3] = for({:fail, ref, %{name: :host_closed}, nil} <- effects, do: ref) |> Enum.sort()
    {desk, [{:fail, 4, %{name: :host_closed}, nil}]} = checkout(desk, 4)
    assert {%{leases: leases}, []} = Desk.checkin(desk, 1, :ok, 0)
    assert leases == %{}
  end

  test "what tools of running commands send gets its place in a closed desk too: these would never end" do
    desk = new(concurrency: 1) |> with_kernels(["a"]) |> fill([1])
    {desk, _effects} = Desk.report(desk, "a", %{unresponsive: true}, 0)
    {desk, []} = checkout(desk, 2, %{nested: true})
    {desk, []} = Desk.close(desk)
    {desk, []} = checkout(desk, 3, %{nested: true})
    {desk, effects} = Desk.report(desk, "a", %{unresponsive: false}, 0)
    assert [2, 3] = for({:grant, ref, _grant} <- effects, do: ref)
    assert {_, [{:fail, 4, %{name: :host_closed}, nil}]} = checkout(desk, 4)
  end

  # Anything may happen in any order: counts must stay right, and nobody waits who could be served.
  test "whatever happens, places are never oversold, nobody is forgotten, and nobody waits for nothing" do
    for seed <- 1..80 do
      start = {new(concurrency: 3, queue: 20, routing: :fastest), MapSet.new(), 0, :rand.seed_s(:exsss, seed)}

      {desk, _, now, _} =
        Enum.reduce(1..300, start, fn n, {desk, open, now, rand} ->
          {what, rand} = :rand.uniform_s(20, rand)
          {k, rand} = :rand.uniform_s(3, rand)
          {o, rand} = :rand.uniform_s(6, rand)
          now = now + 1_000 * k
          id = "k#{k}"
          outcome = Enum.at([:ok, :ok, {:error, :remote_error}, :died, :deadline, :cancelled], o - 1)

          {desk, effects} =
            cond do
              what <= 8 ->
                ask = %{session: "s#{k}", subject: "f#{o}", alone: what == 8, nested: what == 7, exclude: ["k#{o}"]}
                Desk.checkout(desk, n, ask, now)

              what <= 14 and MapSet.size(open) > 0 ->
                Desk.checkin(desk, Enum.at(open, rem(n, MapSet.size(open))), outcome, now)

              what == 15 and MapSet.size(open) > 0 ->
                Desk.withdraw(desk, Enum.at(open, rem(n, MapSet.size(open))), now)

              what <= 17 ->
                if desk.kernels[id],
                  do: {desk, []},
                  else: Desk.join(desk, %{id: id, pid: self(), os_pid: 1, most: 9}, now)

              what == 18 ->
                Desk.leave(desk, id, now)

              what == 19 ->
                case Desk.drain(desk, id, now) do
                  {:ok, desk, effects} -> {desk, effects}
                  :error -> {desk, []}
                end

              true ->
                Desk.report(desk, id, %{unresponsive: o == 1}, now)
            end

          waiting = Map.keys(desk.waiters)
          leased = Map.keys(desk.leases)
          assert MapSet.disjoint?(MapSet.new(waiting), MapSet.new(leased))
          for {:grant, ref, _} <- effects, do: assert(Map.has_key?(desk.leases, ref))
          for {:fail, ref, _, _} <- effects, do: refute(Map.has_key?(desk.waiters, ref))

          assert Bridge.Pool.Queue.length(desk.queue) + :gb_trees.size(desk.alone) + :gb_trees.size(desk.nested) ==
                   map_size(desk.waiters)

          for {id, kernel} <- desk.kernels do
            here = for {_, lease} <- desk.leases, lease.kernel == id, lease.number == kernel.number, do: lease
            assert kernel.running <= kernel.capacity
            assert kernel.in_flight >= kernel.running
            assert kernel.in_flight == length(here)
            assert kernel.alone == Enum.any?(here, & &1.alone)
            if kernel.reserved, do: assert(Enum.any?(desk.waiters, fn {_, w} -> w.reserved == id end))

            unless kernel.draining or kernel.unresponsive or kernel.reserved or kernel.alone do
              assert kernel.running == kernel.capacity or Bridge.Pool.Queue.length(desk.queue) == 0
              assert :gb_trees.is_empty(desk.nested)
            end
          end

          {desk, MapSet.new(waiting ++ leased), now, rand}
        end)

      # In the end everyone gets an answer.
      {desk, _} = Desk.join(desk, %{id: "last", pid: self(), os_pid: 1, most: 64}, now)

      desk =
        Enum.reduce_while(1..1_000, desk, fn _, desk ->
          case Map.keys(desk.leases) do
            [] -> {:halt, desk}
            [ref | _] -> {:cont, desk |> Desk.checkin(ref, :ok, now) |> elem(0)}
          end
        end)

      assert desk.waiters == %{}
    end
  end
end
