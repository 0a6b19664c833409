defmodule Bridge.SessionStoreTest do
  use ExUnit.Case, async: true

  alias Bridge.{SessionStore, TestStores}
  alias Bridge.Store.Staged

  setup do
    cfg = TestStores.start()
    %{cfg: cfg, on: [bridge: cfg.name]}
  end

  describe "variables" do
    test "what is written is read, whatever kind of value it is", %{on: on} do
      for {name, value} <- [
            {"whole", 2 ** 200},
            {"nothing", nil},
            {"float", :nan},
            {"nested", %{"rows" => [1, 2.0, {nil, "a"}], "set" => MapSet.new([1])}},
            {"bytes", Bridge.Bytes.new(<<0, 255>>)},
            {"array", {{:f, 32}, {2}, <<0::64>>}}
          ] do
        assert {:ok, 1} = SessionStore.set_variable("demo", name, value, on)
        assert {:ok, ^value} = SessionStore.get_variable("demo", name, on)
      end
    end

    test "what is read is what the other side would read: keys that were atoms are strings", %{on: on} do
      {:ok, 1} = SessionStore.set_variable("demo", :config, %{depth: 3}, on)
      assert SessionStore.get_variable("demo", "config", on) == {:ok, %{"depth" => 3}}
    end

    test "a reference that is read says whose it is", %{cfg: cfg, on: on} do
      {:ok, 1} = SessionStore.set_variable("demo", "it", [%Bridge.Ref{id: "r-1", class: "pkg.It"}], on)
      {:ok, [ref]} = SessionStore.get_variable("demo", "it", on)
      assert {ref.id, ref.session, ref.bridge} == {"r-1", "demo", cfg.name}
    end

    test "what cannot cross the bridge is refused where it is written, and the path is named", %{on: on} do
      assert {:error, %{name: :not_serializable, message: message}} =
               SessionStore.set_variable("demo", "bad", %{"inner" => [self()]}, on)

      assert message =~ ~s(bad["inner"][0])
      assert {:error, %{name: :not_found}} = SessionStore.get_variable("demo", "bad", on)
    end

    test "each write is a version, and a deletion is one too", %{on: on} do
      assert {:ok, 1} = SessionStore.set_variable("demo", "n", 1, on)
      assert {:ok, 2} = SessionStore.set_variable("demo", "n", 2, on)
      assert {:ok, 3} = SessionStore.delete_variable("demo", "n", on)
      assert {:error, %{name: :not_found}} = SessionStore.get_variable("demo", "n", on)
      assert {:error, %{name: :not_found}} = SessionStore.delete_variable("demo", "n", on)
      assert {:ok, 4} = SessionStore.set_variable("demo", "n", 4, on)

      {:ok, history} = SessionStore.history("demo", "n", on)

      assert Enum.map(history, &{&1.version, &1.value, &1.deleted}) == [
               {1, 1, false},
               {2, 2, false},
               {3, nil, true},
               {4, 4, false}
             ]
    end

    test "if_version makes of a lost update a conflict; 0 is for one that is not there", %{on: on} do
      assert {:ok, 1} = SessionStore.set_variable("demo", "n", 1, [if_version: 0] ++ on)
      assert {:error, %{name: :conflict}} = SessionStore.set_variable("demo", "n", 2, [if_version: 0] ++ on)
      assert {:ok, 2} = SessionStore.set_variable("demo", "n", 2, [if_version: 1] ++ on)
      assert {:error, %{name: :conflict}} = SessionStore.delete_variable("demo", "n", [if_version: 1] ++ on)
      assert {:ok, 3} = SessionStore.delete_variable("demo", "n", [if_version: 2] ++ on)
      assert {:ok, 4} = SessionStore.set_variable("demo", "n", 4, [if_version: 0] ++ on)
    end

    test "an update is one commit or none", %{on: on} do
      {:ok, _} = SessionStore.set_variable("demo", "a", 1, on)
      {:ok, before} = SessionStore.describe("demo", on)

      assert {:error, %{name: :conflict}} =
               SessionStore.update_variables("demo", %{"a" => 2, "b" => 2}, [if_versions: %{"b" => 7}] ++ on)

      assert SessionStore.describe("demo", on) |> elem(1) |> Map.delete(:used) == Map.delete(before, :used)
      assert {:ok, %{"a" => 2, "b" => 1, "c" => 1}} = SessionStore.update_variables("demo", %{a: 2, b: 2, c: 3}, on)
      assert {:ok, %{"a" => 3, "d" => 1}} = SessionStore.update_variables("demo", [d: 1], [delete: ["a"]] ++ on)

      {:ok, history} = SessionStore.history("demo", "b", on)
      assert [%{at: at}] = history
      assert at == before.version + 1
    end

    test "an earlier version is brought back as a new one, which says where it is from", %{on: on} do
      for n <- 1..3, do: {:ok, ^n} = SessionStore.set_variable("demo", "n", n * 10, on)
      assert {:ok, 4} = SessionStore.revert("demo", "n", 1, on)
      assert {:ok, %{value: 10, restores: 1}} = SessionStore.variable("demo", "n", on)
      assert {:error, %{name: :not_found}} = SessionStore.revert("demo", "n", 9, on)
    end

    test "history keeps the last 100 versions, and 16 MiB of those before the newest", %{on: on} do
      for n <- 1..150, do: {:ok, ^n} = SessionStore.set_variable("demo", "n", n, on)
      {:ok, history} = SessionStore.history("demo", "n", on)
      assert Enum.map(history, & &1.version) == Enum.to_list(51..150)

      large = String.duplicate("x", 5 * 1024 * 1024)
      for n <- 1..6, do: {:ok, ^n} = SessionStore.set_variable("demo", "large", large, on)
      {:ok, history} = SessionStore.history("demo", "large", on)
      assert Enum.map(history, & &1.version) == [3, 4, 5, 6]
    end

    test "names are real text, and errors name what there is", %{on: on} do
      assert {:error, %{name: :invalid_params}} = SessionStore.set_variable("demo", "", 1, on)
      assert {:error, %{name: :invalid_params}} = SessionStore.set_variable("demo", <<255>>, 1, on)
      assert {:error, %{name: :invalid_params}} = SessionStore.set_variable("demo", 1, 1, on)
      assert {:error, %{name: :invalid_params}} = SessionStore.set_variable("", "n", 1, on)
      {:ok, 1} = SessionStore.set_variable("demo", "there", 1, on)
      assert {:error, %{name: :not_found, remedy: "There is: there."}} = SessionStore.get_variable("demo", "gone", on)
      assert_raise Bridge.Error, fn -> SessionStore.get_variable!("demo", "gone", on) end
    end

    test "a session may be given as the struct that names its bridge", %{cfg: cfg, on: on} do
      session = %Bridge.Session{id: "demo", bridge: cfg.name}
      {:ok, 1} = SessionStore.set_variable(session, "n", 1)
      assert {:ok, 1} = SessionStore.get_variable("demo", "n", on)
    end
  end

  describe "many at once" do
    test "concurrent writers leave no gap in the versions, and each is told its own", %{on: on} do
      told =
        1..8
        |> Task.async_stream(
          fn _writer -> for n <- 1..200, do: SessionStore.set_variable("demo", "n", n, on) |> elem(1) end,
          max_concurrency: 8,
          timeout: :infinity
        )
        |> Enum.flat_map(fn {:ok, versions} -> versions end)

      assert Enum.sort(told) == Enum.to_list(1..1600)
      assert {:ok, %{version: 1600}} = SessionStore.variable("demo", "n", on)
      assert {:ok, %{version: 1600}} = SessionStore.describe("demo", on)
    end

    test "with if_version no increment is lost", %{on: on} do
      {:ok, 1} = SessionStore.set_variable("demo", "n", 0, on)

      add = fn add ->
        {:ok, %{value: n, version: version}} = SessionStore.variable("demo", "n", on)

        case SessionStore.set_variable("demo", "n", n + 1, [if_version: version] ++ on) do
          {:ok, _version} -> :ok
          {:error, %{name: :conflict}} -> add.(add)
        end
      end

      1..4 |> Task.async_stream(fn _ -> for _ <- 1..50, do: add.(add) end, timeout: :infinity) |> Stream.run()
      assert {:ok, 200} = SessionStore.get_variable("demo", "n", on)
    end

    test "readers see whole commits", %{cfg: cfg, on: on} do
      names = for n <- 1..20, do: "v#{n}"
      write = fn n -> SessionStore.update_variables("demo", Map.new(names, &{&1, n}), on) end
      {:ok, _} = write.(0)

      readers =
        for _reader <- 1..4 do
          Task.async(fn ->
            for _ <- 1..300 do
              found = Staged.fetch_many(Staged.new(), cfg, "demo", names)
              assert map_size(found) == 20
              assert [_one] = found |> Map.values() |> Enum.uniq()
              assert [_one] = SessionStore.list(cfg, "demo") |> Enum.map(& &1.version) |> Enum.uniq()
            end
          end)
        end

      writers = for k <- 1..2, do: Task.async(fn -> for n <- 1..300, do: {:ok, _} = write.(k * 1000 + n) end)
      Task.await_many(readers ++ writers, :infinity)
    end

    test "the session and what it owns are gone for readers at once", %{cfg: cfg, on: on} do
      for round <- 1..50 do
        id = "s#{round}"
        {:ok, _} = SessionStore.update_variables(id, Map.new(1..50, &{"v#{&1}", &1}), on)

        reader =
          Task.async(fn -> for _ <- 1..50, do: map_size(Staged.fetch_many(Staged.new(), cfg, id, ["v1", "v50"])) end)

        :ok = SessionStore.delete_session(id, on)
        assert reader |> Task.await(60_000) |> Enum.uniq() |> Enum.all?(&(&1 in [0, 2]))
      end
    end
  end

  describe "types" do
    test "a value that does not fit is refused where it is written, and by whom it is written", %{cfg: cfg, on: on} do
      {:ok, _} = SessionStore.set_type("demo", "temperature", :float, [ge: 0.0, le: 2.0, default: 0.7] ++ on)
      assert {:ok, 0.7} = SessionStore.get_variable("demo", "temperature", on)
      assert {:ok, 2} = SessionStore.set_variable("demo", "temperature", 1, on)

      assert {:error, %{name: :invalid_value, message: message}} =
               SessionStore.set_variable("demo", "temperature", 3, on)

      assert message == "temperature: 3 is more than 2.0"

      assert {:error, %{name: :invalid_value}} =
               SessionStore.commit(cfg, nil, "demo", [{:set, "temperature", "hot", nil}])

      assert {:error, %{name: :invalid_value}} = Staged.set(Staged.new(), cfg, "demo", "temperature", :nan, nil)
      assert {:ok, %{schema: %{"maximum" => 2.0}}} = SessionStore.variable("demo", "temperature", on)
    end

    test "each type takes what it says and nothing else", %{on: on} do
      for {type, opts, fit, unfit} <- [
            {:integer, [gt: 0, multiple_of: 5], [5, 2000], [0, 7, 5.0, "5", true]},
            {:string, [min_length: 2, pattern: "^a"], ["ab"], ["a", "bb", 1]},
            {:boolean, [], [true], [1, nil]},
            {:choice, [choices: ["short", 3]], ["short", 3], ["long", 3.5]},
            {:list, [max_length: 2], [[], [1, "a"], {1, 2}], [[1, 2, 3], %{}]},
            {:dict, [min_length: 1], [%{"a" => 1}], [%{}, []]},
            {:any, [], [1, nil, {{:f, 32}, {1}, <<0::32>>}], []},
            {:tensor, [dtype: :float32, shape: {nil, 2}], [{{:f, 32}, {1, 2}, <<0::64>>}],
             [{{:f, 64}, {1, 2}, <<0::128>>}, {{:f, 32}, {2}, <<0::64>>}, [1.0]]},
            {:embedding, [dimensions: 2], [[1, 2.5], {{:f, 32}, {2}, <<0::64>>}],
             [[1], ["a", "b"], {{:s, 32}, {2}, <<0::64>>}, {{:f, 32}, {1}, <<0::32>>}]},
            {:module, [choices: ["dspy.Predict"]], ["dspy.Predict", %Bridge.Ref{id: "r", class: "dspy.Predict"}],
             ["dspy.Other", "not a name", 1, %Bridge.Ref{id: "r", class: "dspy.Other"}]},
            {%{type: :object, properties: %{n: %{type: "integer"}}, required: ["n"]}, [], [%{"n" => 1}],
             [%{"n" => "1"}, %{}]}
          ] do
        session = "s#{inspect(type)}"
        assert {:ok, _schema} = SessionStore.set_type(session, "v", type, opts ++ on)
        for value <- fit, do: assert({:ok, _} = SessionStore.set_variable(session, "v", value, on))

        for value <- unfit do
          assert {:error, %{name: :invalid_value, message: "v" <> _}} =
                   SessionStore.set_variable(session, "v", value, on)
        end
      end
    end

    test "a type that makes no sense is refused, and so is one that the value there does not fit", %{on: on} do
      for {type, opts} <- [
            {:floaty, []},
            {:float, [min_length: 2]},
            {:choice, []},
            {:float, [enum: ["a"]]},
            {:tensor, [dtype: "quaternion"]},
            {:embedding, [dimensions: 0]},
            {%{"type" => "nothing"}, []},
            {%{"x-bridge" => "hologram"}, []},
            {%{"description" => String.duplicate("x", 70_000)}, []}
          ] do
        assert {:error, %{name: :invalid_params}} = SessionStore.set_type("demo", "v", type, opts ++ on)
      end

      assert {:error, %{name: :invalid_value}} = SessionStore.set_type("demo", "v", :float, [default: "a"] ++ on)
      {:ok, 1} = SessionStore.set_variable("demo", "v", "text", on)
      assert {:error, %{name: :invalid_value}} = SessionStore.set_type("demo", "v", :integer, on)
      assert {:ok, %{schema: nil}} = SessionStore.variable("demo", "v", on)
    end

    test "a type that is taken away lets everything in", %{on: on} do
      {:ok, _} = SessionStore.set_type("demo", "v", :integer, on)
      assert {:error, %{name: :invalid_value}} = SessionStore.set_variable("demo", "v", "a", on)
      assert {:ok, nil} = SessionStore.set_type("demo", "v", nil, on)
      assert {:ok, 1} = SessionStore.set_variable("demo", "v", "a", on)
    end
  end

  describe "what a command stages" do
    test "it sees its own writes, and nobody else does until it commits", %{cfg: cfg, on: on} do
      {:ok, 1} = SessionStore.set_variable("demo", "n", 1, on)
      {:ok, 2, staged} = Staged.set(Staged.new(), cfg, "demo", "n", 2, nil)
      {:ok, 2, staged} = Staged.set(staged, cfg, "demo", "n", 3, 2)
      {:ok, 1, staged} = Staged.set(staged, cfg, "demo", "new", 1, 0)
      {:ok, staged} = Staged.delete(staged, cfg, "demo", "new", nil)
      assert {:error, %{name: :conflict}} = Staged.set(staged, cfg, "demo", "n", 4, 1)
      assert {:error, %{name: :not_found}} = Staged.delete(staged, cfg, "demo", "new", nil)

      assert {:ok, 3, 2} = Staged.fetch(staged, cfg, "demo", "n")
      assert :error = Staged.fetch(staged, cfg, "demo", "new")
      assert [%{name: "n", version: 2}] = Staged.list(staged, cfg, "demo")
      assert {:ok, 1} = SessionStore.get_variable("demo", "n", on)

      assert {:ok, %{versions: %{"n" => 2, "new" => 0}}} = SessionStore.commit(cfg, nil, "demo", Staged.ops(staged))
      assert {:ok, 3} = SessionStore.get_variable("demo", "n", on)
    end

    test "what it counted on is checked again when it commits", %{cfg: cfg, on: on} do
      {:ok, 1} = SessionStore.set_variable("demo", "n", 1, on)
      {:ok, 2, staged} = Staged.set(Staged.new(), cfg, "demo", "n", 2, 1)
      {:ok, 2} = SessionStore.set_variable("demo", "n", 9, on)
      assert {:error, %{name: :conflict}} = SessionStore.commit(cfg, nil, "demo", Staged.ops(staged))
      assert {:ok, 9} = SessionStore.get_variable("demo", "n", on)
    end

    test "several are read as the command sees them", %{cfg: cfg, on: on} do
      {:ok, _} = SessionStore.update_variables("demo", %{"a" => 1, "b" => 1, "c" => 1}, on)
      {:ok, 2, staged} = Staged.set(Staged.new(), cfg, "demo", "a", 2, nil)
      {:ok, staged} = Staged.delete(staged, cfg, "demo", "b", nil)
      {:ok, 1, staged} = Staged.set(staged, cfg, "demo", "new", 3, nil)
      found = Staged.fetch_many(staged, cfg, "demo", ["a", "b", "c", "new", "none"])
      assert found == %{"a" => {2, 2}, "c" => {1, 1}, "new" => {3, 1}}
    end
  end

  describe "instances and functions" do
    setup %{cfg: cfg, on: on} do
      {:ok, _} = SessionStore.create_session("demo", on)
      record = %{ref: "r-1", class: "pkg.It", args: [1], kwargs: %{}, state: nil, name: "it"}
      {:ok, %{instances: %{"r-1" => 1}}} = SessionStore.commit(cfg, nil, "demo", [{:instance, record, nil}])
      %{record: record}
    end

    test "an instance is found by its ref and by its name", %{cfg: cfg} do
      assert {:ok, %{ref: "r-1", version: 1}} = SessionStore.instance(cfg, "demo", "r-1")
      assert {:ok, %{ref: "r-1"}} = SessionStore.instance(cfg, "demo", "it")
      assert :error = SessionStore.instance(cfg, "demo", "r-2")
      assert :error = SessionStore.instance(cfg, "elsewhere", "r-1")
      assert :ok = SessionStore.name_instance(cfg, "demo", "r-1", "that")
      assert :error = SessionStore.instance(cfg, "demo", "it")
    end

    test "of two calls that change one instance at once the second conflicts", %{cfg: cfg, record: record} do
      changed = %{record | state: %{adapter: "bridge", value: 1, sha256: nil}}
      assert {:ok, %{instances: %{"r-1" => 2}}} = SessionStore.commit(cfg, nil, "demo", [{:instance, changed, 1}])

      assert {:error, %{name: :conflict, message: message}} =
               SessionStore.commit(cfg, nil, "demo", [{:set, "n", 1, nil}, {:instance, %{changed | state: nil}, 1}])

      assert message =~ "pkg.It r-1 was changed by another call (version 1 → 2)"
      assert :error = SessionStore.fetch(cfg, "demo", "n")
      assert {:ok, %{state: %{value: 1}}} = SessionStore.instance(cfg, "demo", "r-1")
    end

    test "two instances have not one name, nor one ref", %{cfg: cfg, record: record} do
      assert {:error, %{name: :conflict}} =
               SessionStore.commit(cfg, nil, "demo", [{:instance, %{record | ref: "r-2"}, nil}])

      assert {:error, %{name: :conflict}} =
               SessionStore.commit(cfg, nil, "demo", [{:instance, %{record | name: "x"}, nil}])
    end

    test "a deleted instance is gone, and is not found to be changed", %{cfg: cfg, record: record, on: on} do
      assert {:ok, _} = SessionStore.commit(cfg, nil, "demo", [{:delete_instance, "r-1"}])
      assert {:error, %{name: :not_found}} = SessionStore.commit(cfg, nil, "demo", [{:instance, record, 1}])
      assert {:error, %{name: :not_found}} = SessionStore.commit(cfg, nil, "demo", [{:delete_instance, "r-1"}])
      assert {:ok, %{instances: 0, bytes: 0}} = SessionStore.describe("demo", on)
    end

    test "a function has the digest of its source", %{cfg: cfg, on: on} do
      :ok = SessionStore.put_function(cfg, "demo", %{name: "f", source: "def f(): pass\n"})
      hash = Base.encode16(:crypto.hash(:sha256, "def f(): pass\n"), case: :lower)
      assert {:ok, %{hash: ^hash, lm: false, secrets: []}} = SessionStore.function(cfg, "demo", "f")
      assert {:ok, %{functions: 1}} = SessionStore.describe("demo", on)
      :ok = SessionStore.delete_function(cfg, "demo", "f")
      assert :error = SessionStore.function(cfg, "demo", "f")
    end

    test "to delete a session frees all of it", %{cfg: cfg, on: on} do
      {:ok, _} = SessionStore.set_variable("demo", "n", 1, on)
      {:ok, _} = SessionStore.set_type("demo", "n", :integer, on)
      :ok = SessionStore.put_function(cfg, "demo", %{name: "f", source: "def f(): pass\n"})
      :ok = Bridge.Secrets.put("demo", "KEY", "value", on)
      :ok = SessionStore.begin_command(cfg, %{id: "c-1", session: "demo"})
      :ok = SessionStore.record_call(cfg, "c-1", 1, %{seq: nil, method: "tool.call", asked: 1, effect: false})
      :ok = SessionStore.begin_command(cfg, %{id: "c-2", session: "demo"})
      {:ok, _} = SessionStore.commit(cfg, "c-2", "demo", [], %{key: "k", digest: "d", value: 1})
      :ok = SessionStore.delete_session("demo", on)

      tables = SessionStore.tables!(cfg)

      for table <- [:main, :history, :commands, :calls, :ended],
          do: assert(:ets.tab2list(Map.fetch!(tables, table)) == [])

      assert {:error, %{name: :not_found}} = SessionStore.get_variable("demo", "n", on)
      assert {:error, %{name: :not_found}} = SessionStore.delete_session("demo", on)
    end
  end

  test "who watches hears of sessions that come and go", %{cfg: cfg, on: on} do
    :ok = SessionStore.watch_sessions(cfg)
    {:ok, _} = SessionStore.set_variable("demo", "n", 1, on)
    assert_receive {:bridge_session, :made, "demo", made}
    :ok = SessionStore.delete_session("demo", on)
    assert_receive {:bridge_session, :gone, "demo", gone} when gone > made
  end

  test "when the store is stopped every function says that the host is closed", %{cfg: cfg, on: on} do
    {:ok, _} = SessionStore.set_variable("demo", "n", 1, on)
    :ok = TestStores.stop(cfg)
    assert {:error, %{name: :host_closed}} = SessionStore.get_variable("demo", "n", on)
    assert {:error, %{name: :host_closed}} = SessionStore.set_variable("demo", "n", 1, on)
    assert {:error, %{name: :host_closed}} = SessionStore.sessions(on)
    assert {:error, %{name: :host_closed}} = SessionStore.delete_session("demo", on)
  end
end
