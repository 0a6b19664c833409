defmodule Bridge.Pool.RoutingTest do
  use ExUnit.Case, async: true

  alias Bridge.Pool.{Kinds, Load, Recent, Routing, Window}

  @ask %{session: "s", subject: "f"}

  defp kernel(id, opts \\ []) do
    Map.merge(%{id: id, in_flight: 0, last_used: 0, load: Load.new()}, Map.new(opts))
  end

  # What a kernel knows that ran `f` alone, each time for so many microseconds.
  defp knows(us, runs \\ 5, subject \\ "f", until \\ 1_000_000_000) do
    began = until - runs * us - us

    {load, _kinds, _now} =
      Enum.reduce(0..runs, {Load.new(), Kinds.new(), began}, fn _, {load, kinds, now} ->
        {load, job} = Load.begin(load, kinds, subject, now)
        {load, kinds} = Load.finish(load, kinds, job, now + us, true)
        {load, kinds, now + us}
      end)

    load
  end

  defp choose(strategy, candidates, opts \\ []) do
    rand = opts[:rand] || :rand.seed_s(:exsss, 1)

    {chosen, _, why} =
      Routing.choose(strategy, @ask, candidates, opts[:kinds] || Kinds.new(), rand, opts[:now] || 1_000_000_000)

    if opts[:why], do: {chosen.id, why}, else: chosen.id
  end

  test "fastest takes the kernel that has been quicker" do
    assert choose(:fastest, [kernel("slow", load: knows(100_000)), kernel("quick", load: knows(10_000))]) == "quick"
  end

  test "fastest takes the idle one of two that are as good, and of idle ones the longest unused" do
    load = knows(50_000)
    {busy, _job} = Load.begin(load, Kinds.new(), "f", 1_000_000_000)
    assert choose(:fastest, [kernel("busy", load: busy, in_flight: 1), kernel("idle", load: load)]) == "idle"
    assert choose(:fastest, [kernel("a", last_used: 7, load: load), kernel("b", last_used: 3, load: load)]) == "b"
  end

  test "fastest tries a kernel of which nothing is known" do
    assert choose(:fastest, [kernel("known", load: knows(50_000), last_used: 9), kernel("new", load: Load.new())]) ==
             "new"
  end

  test "fastest keeps off a kernel that computes something long, even if it is usually quicker" do
    # It has had a command of one second for a millisecond.
    {load, _} = Load.begin(knows(1_000_000, 5, "long"), Kinds.new(), "long", 999_999_000)
    # Both know f, too.
    with_f = fn load -> %{load | known: Recent.put(load.known, "f", Recent.get(knows(20_000).known, "f"))} end

    kernels = [
      kernel("computing", load: with_f.(load), in_flight: 1),
      kernel("idle", load: knows(30_000), in_flight: 0)
    ]

    assert choose(:fastest, kernels) == "idle"
  end

  test "what has not been seen for long is worth another try" do
    slow = kernel("slow", load: knows(900_000, 5, "f", 1_000_000_000), last_used: 0)
    quick = kernel("quick", load: knows(10_000, 5, "f", 1_040_000_000), last_used: 1)
    assert choose(:fastest, [slow, quick], now: 1_010_000_000) == "quick"
    assert choose(:fastest, [slow, quick], now: 1_041_000_000) == "slow"
  end

  test "least loaded takes the fewest in flight, and of these the longest unused" do
    kernels = [
      kernel("a", in_flight: 2),
      kernel("b", in_flight: 1, last_used: 9),
      kernel("c", in_flight: 1, last_used: 4)
    ]

    assert choose(:least_loaded, kernels) == "c"
  end

  test "random takes each of them, and the same with the same seed" do
    kernels = for id <- ["a", "b", "c"], do: kernel(id)
    chosen = for seed <- 1..100, do: choose(:random, kernels, rand: :rand.seed_s(:exsss, seed))
    assert Enum.uniq(chosen) |> Enum.sort() == ["a", "b", "c"]
    assert chosen == for(seed <- 1..100, do: choose(:random, kernels, rand: :rand.seed_s(:exsss, seed)))
  end

  test "a function is asked with what it may know, and chooses by id" do
    test = self()

    pinned = fn ask, candidates ->
      send(test, {ask, candidates})
      List.last(candidates).id
    end

    assert choose(pinned, [kernel("a"), kernel("b", load: knows(20_000))]) == "b"
    assert_received {%{session: "s", subject: "f"}, [%{id: "a", in_flight: 0, expected: 0.0}, %{id: "b", expected: ms}]}
    assert_in_delta ms, 20.0, 0.1
  end

  test "a function that fails, or names nobody, costs its say and nothing else" do
    kernels = [kernel("a", in_flight: 1), kernel("b")]

    for {fun, says} <- [
          {fn _, _ -> raise "oops" end, "oops"},
          {fn _, _ -> throw(:it) end, "it"},
          {fn _, _ -> exit(:no) end, "no"},
          {fn _, _ -> "nobody" end, "nobody"},
          {fn _, _ -> %{} end, "candidate"}
        ] do
      assert {"b", why} = choose(fun, kernels, why: true)
      assert why =~ says
    end
  end

  # -- what the load expects ------------------------------------------------------------------

  # Runs `count` commands of `subject` at once, all from `now` on, each for `us(n)`.
  defp crowd(load, kinds, subject, count, us, now) do
    {load, jobs} =
      Enum.reduce(1..count, {load, []}, fn _, {load, jobs} ->
        {load, job} = Load.begin(load, kinds, subject, now)
        {load, [job | jobs]}
      end)

    Enum.reduce(jobs, {load, kinds}, fn job, {load, kinds} -> Load.finish(load, kinds, job, now + us, true) end)
  end

  test "a command that takes as long beside ten others as alone waits rather than computes" do
    {_, kinds, _} =
      Enum.reduce(1..60, {Load.new(), Kinds.new(), 0}, fn n, {load, kinds, now} ->
        {load, kinds} = crowd(load, kinds, "waits", rem(n * 7, 10) + 1, 100_000, now)
        {load, kinds, now + 200_000}
      end)

    assert Kinds.waits?(kinds, "waits")
  end

  test "a command that takes twice as long beside one other computes" do
    {load, kinds, now} =
      Enum.reduce(1..60, {Load.new(), Kinds.new(), 0}, fn n, {load, kinds, now} ->
        count = rem(n * 7, 10) + 1
        {load, kinds} = crowd(load, kinds, "computes", count, 10_000 * count, now)
        {load, kinds, now + 200_000}
      end)

    refute Kinds.waits?(kinds, "computes")
    # However many there were: alone it takes 10 ms, and beside one that has just begun, 20.
    assert_in_delta Load.expected(load, kinds, "computes", now), 10_000, 100
    {load, _} = Load.begin(load, kinds, "computes", now)
    assert_in_delta Load.expected(load, kinds, "computes", now), 20_000, 200
  end

  test "what a load remembers is bounded, and it is as idle as at first when all have ended" do
    {load, kinds} =
      Enum.reduce(1..5_000, {Load.new(), Kinds.new()}, fn n, {load, kinds} ->
        {load, job} = Load.begin(load, kinds, "f#{n}", n * 10)
        Load.finish(load, kinds, job, n * 10 + 5, true)
      end)

    assert Recent.size(load.known) == 4_096
    assert Load.ahead(load, kinds, "f1", 10.0, 100_000) == 0.0
    assert {load.jobs, load.computing, load.work, load.since} == {0, 0, 0.0, 0.0}
  end

  test "an expectation is never negative, whatever begins and ends" do
    for seed <- 1..30 do
      Enum.reduce(1..200, {Load.new(), Kinds.new(), [], 0, :rand.seed_s(:exsss, seed)}, fn _,
                                                                                           {load, kinds, jobs, now,
                                                                                            rand} ->
        {what, rand} = :rand.uniform_s(2, rand)
        {n, rand} = :rand.uniform_s(3, rand)
        {passed, rand} = :rand.uniform_s(50_000, rand)
        now = now + passed
        assert Load.expected(load, kinds, "f#{n}", now) >= 0
        assert load.jobs == length(jobs)

        case {what, jobs} do
          {2, [job | jobs]} ->
            {load, kinds} = Load.finish(load, kinds, job, now, n > 1)
            {load, kinds, jobs, now, rand}

          _ ->
            {load, job} = Load.begin(load, kinds, "f#{n}", now)
            {load, kinds, jobs ++ [job], now, rand}
        end
      end)
    end
  end

  test "a window knows how many of the last ones failed" do
    window = Enum.reduce([true, true, true, false, false, true], Window.new(4), &Window.add(&2, &1))
    assert {Window.failures(window), Window.rate(window), window.length} == {2, 0.5, 4}
    assert Window.rate(Window.new(3)) == 0.0
  end
end
