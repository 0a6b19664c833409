defmodule Bridge.Store.LimitsTest do
  use ExUnit.Case, async: true

  alias Bridge.{Config, SessionStore, TestStores}
  alias Bridge.Store.Staged

  describe "quotas" do
    setup do
      cfg = TestStores.start(quota: %{things: 3, bytes: 10_000, history: 5})
      %{cfg: cfg, on: [bridge: cfg.name]}
    end

    test "a session holds so many things, and a refused commit leaves nothing", %{cfg: cfg, on: on} do
      {:ok, _} = SessionStore.update_variables("demo", %{"a" => 1, "b" => 2}, on)
      assert {:error, %{name: :quota_exceeded}} = SessionStore.update_variables("demo", %{"c" => 1, "d" => 2}, on)
      {:ok, _} = SessionStore.set_variable("demo", "c", 1, on)
      assert {:error, %{name: :quota_exceeded}} = SessionStore.put_function(cfg, "demo", %{name: "f", source: "x"})
      assert {:error, %{name: :quota_exceeded}} = Bridge.Secrets.put("demo", "k", "v", on)
      assert {:ok, 2} = SessionStore.set_variable("demo", "a", 2, on)
      {:ok, _} = SessionStore.delete_variable("demo", "a", on)
      assert :ok = Bridge.Secrets.put("demo", "k", "v", on)
    end

    test "a session holds so many bytes; what becomes smaller always fits", %{cfg: cfg, on: on} do
      {:ok, _} = SessionStore.set_variable("demo", "a", String.duplicate("x", 9_000), on)

      assert {:error, %{name: :quota_exceeded}} =
               SessionStore.set_variable("demo", "b", String.duplicate("x", 2_000), on)

      assert {:error, %{name: :quota_exceeded}} =
               Staged.set(Staged.new(), cfg, "demo", "b", String.duplicate("x", 2_000), nil)

      {:ok, _} = SessionStore.set_variable("demo", "a", "small", on)
      assert {:ok, _} = SessionStore.set_variable("demo", "b", String.duplicate("x", 2_000), on)
    end

    test "what a command stages is counted together, each variable once", %{cfg: cfg, on: on} do
      {:ok, _} = SessionStore.create_session("demo", on)
      {:ok, 1, staged} = Staged.set(Staged.new(), cfg, "demo", "a", String.duplicate("x", 6_000), nil)
      {:ok, 1, staged} = Staged.set(staged, cfg, "demo", "a", String.duplicate("x", 7_000), nil)

      assert {:error, %{name: :quota_exceeded}} =
               Staged.set(staged, cfg, "demo", "b", String.duplicate("x", 4_000), nil)

      {:ok, 1, staged} = Staged.set(staged, cfg, "demo", "a", "small", nil)
      assert {:ok, 1, _staged} = Staged.set(staged, cfg, "demo", "b", String.duplicate("x", 4_000), nil)
    end

    test "names that were used and deleted are counted too, for their versions go on", %{on: on} do
      for n <- 1..3 do
        {:ok, _} = SessionStore.set_variable("demo", "v#{n}", 1, on)
        {:ok, _} = SessionStore.delete_variable("demo", "v#{n}", on)
      end

      assert {:error, %{name: :quota_exceeded, remedy: "Use their names again" <> _}} =
               SessionStore.set_variable("demo", "v4", 1, on)

      assert {:ok, 3} = SessionStore.set_variable("demo", "v1", 1, on)
    end

    test "history is as long as it may be", %{on: on} do
      for n <- 1..20, do: {:ok, ^n} = SessionStore.set_variable("demo", "n", n, on)
      {:ok, history} = SessionStore.history("demo", "n", on)
      assert Enum.map(history, & &1.version) == [16, 17, 18, 19, 20]
    end

    test "the results of idempotency keys are counted, and the commit that would be too much is none", %{
      cfg: cfg,
      on: on
    } do
      :ok = SessionStore.begin_command(cfg, %{id: "c-1", session: "demo"})
      result = %{key: "k", digest: "d", value: String.duplicate("x", 20_000)}
      assert {:error, %{name: :quota_exceeded}} = SessionStore.commit(cfg, "c-1", "demo", [{:set, "n", 1, nil}], result)
      assert {:error, %{name: :not_found}} = SessionStore.get_variable("demo", "n", on)
    end
  end

  describe "a time to live" do
    setup do
      {clock, move} = TestStores.clock()
      cfg = TestStores.start(clock: clock, ttl: 1_000)
      %{cfg: cfg, on: [bridge: cfg.name], move: move}
    end

    test "a session that is not used expires with all it owns", %{cfg: cfg, on: on, move: move} do
      {:ok, _} = SessionStore.set_variable("demo", "n", 1, on)
      move.(999)
      assert {:ok, 1} = SessionStore.get_variable("demo", "n", on)
      move.(1_000)
      assert {:error, %{name: :not_found, message: message}} = SessionStore.get_variable("demo", "n", on)
      assert message =~ "has expired: it was not used for 1000 ms"
      assert :error = SessionStore.fetch(cfg, "demo", "n")
      assert {:ok, []} = SessionStore.sessions(on)
      assert SessionStore.sweep(cfg) == ["demo"]
      assert :ets.tab2list(SessionStore.tables!(cfg).main) == []
    end

    test "each use begins its time anew: to read, to write, to list", %{cfg: cfg, on: on, move: move} do
      {:ok, _} = SessionStore.set_variable("demo", "n", 1, on)

      for use <- [
            fn -> SessionStore.get_variable("demo", "n", on) end,
            fn -> SessionStore.set_variable("demo", "n", 2, on) end,
            fn -> SessionStore.variables("demo", on) end,
            fn -> SessionStore.touch(cfg, "demo") end,
            fn -> SessionStore.create_session("demo", on) end
          ] do
        move.(900)
        assert use.() == :ok or match?({:ok, _found}, use.())
        assert SessionStore.sweep(cfg) == []
      end
    end

    test "to look at it is no use of it", %{cfg: cfg, on: on, move: move} do
      {:ok, _} = SessionStore.set_variable("demo", "n", 1, on)
      move.(600)
      {:ok, %{expires: expires}} = SessionStore.describe("demo", on)
      {:ok, ["demo"]} = SessionStore.sessions(on)
      assert expires == cfg |> SessionStore.tables!() |> then(& &1.clock.()) |> Kernel.+(400)
      move.(400)
      assert SessionStore.sweep(cfg) == ["demo"]
    end

    test "to write to one that has expired begins a new one, with nothing of the old", %{on: on, move: move} do
      {:ok, _} = SessionStore.update_variables("demo", %{"a" => 1, "n" => 1}, on)
      move.(1_000)
      assert {:ok, 1} = SessionStore.set_variable("demo", "n", 2, on)
      assert {:ok, [%{name: "n"}]} = SessionStore.variables("demo", on)
    end

    test "a session at work does not expire, and its time begins when the work ends", %{cfg: cfg, on: on, move: move} do
      {:ok, _} = SessionStore.set_variable("demo", "n", 1, on)
      [first, second] = for _ <- 1..2, do: spawn(fn -> receive do: (:end -> :ok) end)
      for pid <- [first, second], do: :ok = SessionStore.busy(cfg, "demo", pid)
      move.(10_000)
      assert SessionStore.sweep(cfg) == []
      :ok = ended(cfg, first)
      assert SessionStore.sweep(cfg) == []
      move.(10_000)
      assert {:ok, 1} = SessionStore.get_variable("demo", "n", on)
      :ok = ended(cfg, second)
      move.(999)
      assert SessionStore.sweep(cfg) == []
      move.(1)
      assert SessionStore.sweep(cfg) == ["demo"]
    end

    # And its store has heard of it.
    defp ended(cfg, pid) do
      send(pid, :end)
      if is_map_key(:sys.get_state(Config.process(cfg.name, :store)).busy, pid), do: ended(cfg, pid), else: :ok
    end

    test "work ends with its process", %{cfg: cfg, on: on, move: move} do
      {:ok, _} = SessionStore.set_variable("demo", "n", 1, on)
      worker = spawn(fn -> receive do: (:end -> :ok) end)
      monitor = Process.monitor(worker)
      :ok = SessionStore.busy(cfg, "demo", worker)
      move.(10_000)
      assert SessionStore.sweep(cfg) == []
      send(worker, :end)
      assert_receive {:DOWN, ^monitor, :process, ^worker, :normal}
      # The store hears of it too, before or after: whoever it tells first, the time begins then.
      :ok = eventually_idle(cfg, "demo")
      move.(1_000)
      assert SessionStore.sweep(cfg) == ["demo"]
    end

    test "a session without one lives for ever", %{cfg: cfg, on: on, move: move} do
      {:ok, "kept"} = SessionStore.create_session("kept", [ttl: nil] ++ on)
      {:ok, id} = SessionStore.create_session(nil, on)
      move.(1_000_000_000)
      assert SessionStore.sweep(cfg) == [id]
      assert {:ok, ["kept"]} = SessionStore.sessions(on)
      assert {:error, %{name: :invalid_params}} = SessionStore.create_session("x", [ttl: 0] ++ on)
    end

    test "a key's result is kept for 24 hours", %{cfg: cfg, on: on, move: move} do
      {:ok, _} = SessionStore.create_session("demo", [ttl: nil] ++ on)
      :ok = SessionStore.begin_command(cfg, %{id: "c-1", session: "demo"})
      {:ok, _} = SessionStore.commit(cfg, "c-1", "demo", [], %{key: "k", digest: "d", value: [1]})
      move.(24 * 60 * 60 * 1000 - 1)
      assert {:ok, %{digest: "d", value: [1]}} = SessionStore.result(cfg, "demo", "k")
      move.(1)
      assert :error = SessionStore.result(cfg, "demo", "k")
      SessionStore.sweep(cfg)
      assert {:ok, %{bytes: 0}} = SessionStore.describe("demo", on)
    end
  end

  # A message of the monitor's that the store has not read yet is read before what is asked of it after.
  defp eventually_idle(cfg, id) do
    case SessionStore.tables!(cfg) |> Bridge.Store.Tables.session(id) do
      {_state, %{live: live}} -> if :atomics.get(live, 2) == 0, do: :ok, else: eventually_idle(cfg, id)
    end
  end
end
