defmodule Bridge.Store.ExchangeTest do
  use ExUnit.Case, async: true

  alias Bridge.{Secrets, SessionStore, TestKernels, TestStores}
  alias Bridge.Store.Exchange

  setup do
    directory = Path.join(System.tmp_dir!(), "bridge-exchange-#{System.unique_integer([:positive])}-#{System.pid()}")
    File.mkdir_p!(directory)
    on_exit(fn -> File.rm_rf!(directory) end)
    cfg = TestStores.start()
    %{cfg: cfg, on: [bridge: cfg.name], path: Path.join(directory, "sessions.json"), directory: directory}
  end

  # What both hosts can hold.
  @values %{
    "whole" => 2 ** 100,
    "text" => "Grüße",
    "nested" => %{"rows" => [1, 2.5, nil, true], "tuple" => {1, "a"}},
    "bytes" => %Bridge.Bytes{data: <<0, 255>>},
    "large" => %Bridge.Bytes{data: :binary.copy(<<7>>, 100_000)},
    "array" => {{:f, 32}, {1, 2}, <<0, 0, 128, 63, 0, 0, 0, 64>>},
    "day" => ~D[2024-02-29],
    "nan" => :nan,
    "point" => %Bridge.Record{kind: :record, class: "elsewhere.Thing", fields: %{"a" => 1}}
  }

  defp fill(cfg) do
    on = [bridge: cfg.name]
    for {name, value} <- Map.delete(@values, "point"), do: {:ok, 1} = SessionStore.set_variable("demo", name, value, on)
    for n <- 1..3, do: {:ok, ^n} = SessionStore.set_variable("demo", "count", n, on)
    {:ok, 4} = SessionStore.revert("demo", "count", 1, on)
    {:ok, _} = SessionStore.set_type("demo", "temperature", :float, [ge: 0, le: 2, default: 0.7] ++ on)
    {:ok, _} = SessionStore.set_type("demo", "query", :embedding, [dimensions: 2] ++ on)
    {:ok, _} = SessionStore.create_session("demo", [ttl: 60_000] ++ on)
    :ok = Secrets.put("demo", "KEY", "not-in-the-file", on)
    source = "def double(x):\n    return 2 * x\n"
    :ok = SessionStore.put_function(cfg, "demo", %{name: "double", source: source, secrets: ["KEY"]})

    :ok =
      SessionStore.put_lm(cfg, "demo", %{
        model: "openai/gpt",
        api_base: nil,
        adapter: "JSONAdapter",
        options: %{"n" => 1}
      })

    pickle = %Bridge.Bytes{data: "a pickle"}
    sha256 = Base.encode16(:crypto.hash(:sha256, "a pickle"), case: :lower)

    records = [
      %{
        ref: "r-1",
        class: "pkg.It",
        args: [1, {2}],
        kwargs: %{"a" => 1},
        state: %{adapter: "pickle", value: pickle, sha256: sha256},
        name: "it",
        methods: ["run"]
      },
      %{ref: "r-2", class: "pkg.Bare", args: [], kwargs: %{}, state: nil, name: ""}
    ]

    {:ok, _} = SessionStore.commit(cfg, nil, "demo", for(record <- records, do: {:instance, record, nil}))
    :ok
  end

  defp python(code, arguments) do
    root = Path.expand("../../../..", __DIR__)
    env = [{"PYTHONPATH", Enum.map_join(["host/python", "kernel"], ":", &Path.join(root, &1))}]
    {out, status} = System.cmd(TestKernels.python(), ["-c", code | arguments], env: env, stderr_to_stdout: true)
    assert status == 0, out
    out
  end

  test "what is exported is imported as it was", %{cfg: cfg, on: on, path: path} do
    :ok = fill(cfg)
    :ok = Exchange.export(path, [history: true] ++ on)
    assert Bitwise.band(File.stat!(path).mode, 0o777) == 0o600
    refute File.read!(path) =~ "not-in-the-file"

    other = TestStores.start()
    assert {:ok, ["demo"]} = Exchange.import(path, bridge: other.name)
    same(cfg, other)
    assert {:ok, []} = Secrets.list("demo", bridge: other.name)
    assert {:error, %{name: :invalid_value}} = SessionStore.set_variable("demo", "query", [1], bridge: other.name)
  end

  test "an import is on disk as a whole, with its history", %{cfg: cfg, on: on, path: path, directory: directory} do
    :ok = fill(cfg)
    :ok = Exchange.export(path, [history: true] ++ on)
    other = TestStores.start(store: Path.join(directory, "store"))
    assert {:ok, ["demo"]} = Exchange.import(path, bridge: other.name)
    :ok = TestStores.stop(other)
    again = TestStores.start(store: Path.join(directory, "store"))
    same(cfg, again)
  end

  test "without history there is the newest version of each, with its number", %{cfg: cfg, on: on, path: path} do
    :ok = fill(cfg)
    :ok = Exchange.export(path, on)
    other = TestStores.start()
    {:ok, ["demo"]} = Exchange.import(path, bridge: other.name)
    assert {:ok, [%{version: 4, value: 1, restores: 1}]} = SessionStore.history("demo", "count", bridge: other.name)
    assert {:ok, 5} = SessionStore.set_variable("demo", "count", 5, bridge: other.name)
  end

  defp same(one, other) do
    facts = fn cfg ->
      tables = SessionStore.tables!(cfg)
      {:ok, session} = Bridge.Store.Tables.session(tables, "demo")

      for fact <- Bridge.Store.Tables.session_facts(tables, session), elem(fact, 0) != :secret do
        case fact do
          {:session, id, put} ->
            {:session, id, Map.delete(put, :used)}

          # A recipe may be written without its state.
          {:instance, id, %{state: nil} = it} ->
            {:instance, id, %{it | state: %{adapter: "recipe", value: nil, sha256: nil}}}

          fact ->
            fact
        end
      end
    end

    assert facts.(one) == facts.(other)
  end

  describe "with the Python host" do
    test "it reads what this host exports, and this host reads what it then exports: all the same", %{
      cfg: cfg,
      on: on,
      path: path,
      directory: directory
    } do
      :ok = fill(cfg)
      :ok = Exchange.export(path, [history: true] ++ on)
      back = Path.join(directory, "back.json")

      python(
        """
        import sys, json, jsonschema, pathlib
        from bridge_host.store import Store
        from bridge_host.store.exchange import read_export, read_file, facts_of, export_sessions, write_file
        schema = json.loads(pathlib.Path(sys.argv[3]).read_text())
        jsonschema.Draft202012Validator(schema).validate(json.loads(pathlib.Path(sys.argv[1]).read_text()))
        store = Store()
        store.take(facts_of(read_export(read_file(sys.argv[1])), now=store.clock()))
        state = store.peek("demo")
        assert state.get("nested").value.read("x") == {"rows": [1, 2.5, None, True], "tuple": (1, "a")}
        assert state.get("whole").value.read("x") == 2**100
        assert state.get("bytes").value.read("x") == b"\\0\\xff"
        assert state.get("array").value.read("x").tolist() == [[1.0, 2.0]]
        assert [put.value.read("x") for put in state.history("count")] == [1, 2, 3, 1]
        assert state.ttl == 60 and state.lm.model == "openai/gpt"
        histories = {"demo": store.log.histories("demo")}
        write_file(sys.argv[2], export_sessions(state.facts(), now=store.clock(), histories=histories))
        """,
        [path, back, Path.expand("../../../../docs/session-export.schema.json", __DIR__)]
      )

      other = TestStores.start()
      assert {:ok, ["demo"]} = Exchange.import(back, bridge: other.name)
      same(cfg, other)
    end

    test "this host reads what that one exports, of every kind of value", %{path: path} do
      python(
        """
        import sys, datetime, decimal, uuid
        import numpy as np
        from bridge_host import Host
        from bridge_host.store import Store
        from bridge_host.store.exchange import export_sessions, write_file
        from bridge_host.store.types import VariableType
        from bridge_host.values import store as stored
        s = Store()
        state, _ = s.open("from-python", ttl=90)
        values = {
            "day": datetime.date(2024, 2, 29),
            "when": datetime.datetime(2024, 10, 27, 2, 30, tzinfo=datetime.timezone.utc),
            "delta": datetime.timedelta(microseconds=-1), "dec": decimal.Decimal("-1.10"),
            "set": {1, 2}, "fs": frozenset([1]), "uuid": uuid.UUID(int=5), "c": 1.5 + 2j,
            "arr": np.arange(6, dtype="<i4").reshape(2, 3), "scalar": np.float32(1.5),
            "bool_array": np.array([True]), "map": {2: "b", None: "c"}, "dict": {"$bridge": 1},
            "nan": float("nan"), "ba": bytearray(b"x"),
        }
        for name, value in values.items():
            state.set(name, stored(value, name))
        state.define("t", VariableType.make("tensor", dtype="float32", shape=(None, 2), default=np.zeros((1, 2), "f4")))
        state.define("opt", VariableType.make(int | None, ge=3))
        write_file(sys.argv[1], export_sessions(state.facts(), now=s.clock()))
        """,
        [path]
      )

      other = TestStores.start()
      on = [bridge: other.name]
      assert {:ok, ["from-python"]} = Exchange.import(path, on)
      get = &SessionStore.get_variable!("from-python", &1, on)
      assert get.("day") == ~D[2024-02-29]
      assert get.("when") == ~U[2024-10-27 02:30:00Z]
      assert get.("set") == MapSet.new([1, 2])
      assert get.("arr") == {{:s, 32}, {2, 3}, for(n <- 0..5, into: <<>>, do: <<n::32-little>>)}
      assert get.("map") == %{2 => "b", nil => "c"}
      assert get.("nan") == :nan
      assert {{:f, 32}, {1, 2}, <<0::64>>} = get.("t")
      assert {:ok, %{type: "Decimal"}} = SessionStore.variable("from-python", "dec", on)
      assert {:ok, %{ttl: 90_000, variables: 16}} = SessionStore.describe("from-python", on)
      assert {:error, %{name: :invalid_value}} = SessionStore.set_variable("from-python", "opt", 2, on)
      assert {:ok, 1} = SessionStore.set_variable("from-python", "opt", nil, on)
      assert {:error, %{name: :invalid_value}} = SessionStore.set_variable("from-python", "t", [1.0], on)
    end
  end

  describe "what is no sound export" do
    setup %{cfg: cfg, on: on, path: path} do
      :ok = fill(cfg)
      :ok = Exchange.export(path, [history: true] ++ on)
      {:ok, export} = Bridge.JSON.decode(File.read!(path))
      other = TestStores.start(quota: %{things: 50, bytes: 1_000_000})
      %{export: export, other: [bridge: other.name]}
    end

    test "is refused, says where, and makes nothing", %{export: export, other: other, path: path} do
      session = fn change -> update_in(export, ["sessions", Access.at(0)], change) end

      variable = fn name, change ->
        session.(&update_in(&1, ["variables", Access.filter(fn v -> v["name"] == name end)], change))
      end

      instance = fn change -> session.(&update_in(&1, ["instances", Access.at(0)], change)) end
      function = fn change -> session.(&update_in(&1, ["functions", Access.at(0)], change)) end

      for {broken, words} <- [
            {[], "it says no format"},
            {%{export | "format" => "zip"}, "its format is \"zip\""},
            {%{export | "version" => 2}, "the export has version 2"},
            {Map.delete(export, "bridge"), "the export has no bridge"},
            {Map.put(export, "more", 1), "a member \"more\""},
            {%{export | "sessions" => export["sessions"] ++ export["sessions"]}, "the session \"demo\" twice"},
            {session.(&%{&1 | "id" => ""}), "its id is no such thing"},
            {session.(&%{&1 | "ttl" => 0}), "its ttl"},
            {session.(&%{&1 | "created" => 1.0e300}), "its created"},
            {session.(&%{&1 | "version" => -1}), "its version"},
            {session.(&%{&1 | "version" => 1}), "and the session is at 1"},
            {session.(&%{&1 | "lm" => %{}}), "its language model has no model"},
            {session.(&%{&1 | "variables" => [1]}), "a variable is no object"},
            {variable.("count", &%{&1 | "current" => nil}), "has a history and no current version"},
            {variable.("count", &%{&1 | "history" => Enum.reverse(&1["history"])}), "comes after version"},
            {variable.("count", &put_in(&1["current"]["value"]["json"], %{"$bridge" => "what"})),
             "variable \"count\", version 4"},
            {variable.("large", &put_in(&1["current"]["value"]["buffers"], ["?"])), "a buffer is no base64"},
            {variable.("large", &put_in(&1["current"]["value"]["buffers"], [])), "variable \"large\""},
            {variable.("query", &put_in(&1["schema"]["dimensions"], "two")), "its type cannot be used"},
            {variable.("temperature", &put_in(&1["schema"]["type"], "warm")), "its type cannot be used"},
            {instance.(&put_in(&1["args"]["json"], %{})), "its arguments are no list and no object"},
            {instance.(&%{&1 | "sha256" => "0"}), "its pickled state is not what its digest says"},
            {instance.(&%{&1 | "adapter" => "eval"}), "its adapter"},
            {function.(&%{&1 | "source" => "import os"}), "is not what its digest says"}
          ] do
        File.write!(path, Bridge.JSON.encode!(broken))
        assert {:error, %{name: :store_damaged, message: message}} = Exchange.import(path, other)
        assert message =~ words
      end

      whole = Bridge.JSON.canonical(export)

      for bytes <- 0..byte_size(whole)//997 do
        File.write!(path, binary_part(whole, 0, min(bytes, byte_size(whole) - 1)))
        assert {:error, %{name: :store_damaged}} = Exchange.import(path, other)
      end

      assert {:ok, []} = SessionStore.sessions(other)
    end

    test "no file makes atoms", %{export: export, other: other, path: path} do
      word = "never_seen_#{System.unique_integer([:positive])}_before"
      value = %{"type" => word, "json" => %{word => [word]}, "buffers" => []}
      version = %{"version" => 1, "at" => 0, "written" => 1, "value" => value}
      variable = %{"name" => word, "schema" => %{"title" => word}, "current" => version}
      export = put_in(export, ["sessions", Access.at(0), "variables"], [variable])
      File.write!(path, Bridge.JSON.encode!(export))
      assert {:ok, ["demo"]} = Exchange.import(path, other)
      assert_raise ArgumentError, fn -> String.to_existing_atom(word) end
    end

    test "one that would be too much is refused, and so is one whose session is there", %{
      export: export,
      other: other,
      path: path
    } do
      :ok = File.write(path, Bridge.JSON.encode!(export))
      small = TestStores.start(quota: %{things: 5, bytes: 1_000_000})
      assert {:error, %{name: :quota_exceeded}} = Exchange.import(path, bridge: small.name)
      assert {:ok, ["demo"]} = Exchange.import(path, other)
      assert {:error, %{name: :conflict}} = Exchange.import(path, other)
    end

    test "a file that is not there, and a directory that is none, are told", %{path: path, on: on} do
      assert {:error, %{name: :not_found}} = Exchange.import(path <> ".none", on)
      assert {:error, %{name: :store_failed}} = Exchange.export(Path.join(path, "inside.json"), on)
      assert {:error, %{name: :not_found}} = Exchange.export(path, [sessions: ["none"]] ++ on)
    end
  end
end
