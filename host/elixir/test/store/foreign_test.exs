defmodule Bridge.Store.ForeignTest do
  # Files that are sound, each byte of them, and that this host did not write.
  use ExUnit.Case, async: true

  alias Bridge.{Config, Secrets, SessionStore, TestStores}
  alias Bridge.Store.{Log, Snapshot, Tables}

  @session {:session, "demo", %{created: 1, used: 2, ttl: nil, version: 3, lm: nil}}
  @lm %{model: "m", api_base: nil, adapter: nil, options: %{"temperature" => 0.5}}
  @put %{there: true, version: 1, value: [1, "a"], type: "list", size: 9, at: 1, written: 1, restores: nil}
  @deleted %{@put | there: false, version: 2, value: nil, type: nil, size: 0}
  @record %{
    ref: "r",
    class: "pkg.It",
    args: [1],
    kwargs: %{"a" => 1},
    state: %{adapter: "bridge", value: 1, sha256: nil},
    name: "it",
    methods: ["run"],
    cache: nil,
    version: 1
  }
  @source "def f(): pass\n"
  @function %{
    name: "f",
    source: @source,
    hash: Base.encode16(:crypto.hash(:sha256, @source), case: :lower),
    lm: false,
    secrets: ["K"],
    cache: nil
  }
  @command %{
    id: "c",
    session: "demo",
    method: "function.call",
    subject: "f",
    params: {:call, "f", [], %{}, []},
    key: "key",
    digest: "d",
    attempt: 1,
    sealed: false,
    began: 1,
    status: :running,
    error: nil
  }
  @call %{seq: 1, method: "tool.call", asked: {["t", [], %{}], []}, effect: true}
  @ended Map.merge(@command, %{id: "e", status: :ended, ended: 2, calls: 0})

  # Every kind of fact, as this host writes it.
  @facts [
    @session,
    {:session, "demo", %{created: 1, used: 3, ttl: 86_400_000_000_000, version: 3, lm: @lm}},
    {:type, "demo", "n", %{"type" => "array"}},
    {:variable, "demo", "n", @put},
    {:variable, "demo", "n", @deleted},
    {:variable, "demo", "n", %{@put | version: 3, restores: 1}},
    {:type, "demo", "other", %{"type" => "number"}},
    {:type, "demo", "other", nil},
    {:instance, "demo", @record},
    {:function, "demo", @function},
    {:secret, "demo", "K", "sealed"},
    {:result, "demo", "k", %{digest: "d", value: 1, command: "c", ended: 1}},
    {:result, "demo", "s", %{digest: "d", value: {:sealed, "x"}, command: "c", ended: 1}},
    {:begun, @command},
    {:begun, %{@command | id: "s", key: nil, sealed: true, params: {:sealed, "x"}}},
    {:tried, "c", 2},
    {:called, "c", 1, @call},
    {:answered, "c", 1, {:ok, "1", []}},
    {:called, "c", 2, @call},
    {:calls_gone, "c", [2]},
    {:begun, %{@command | id: "k", key: "kept"}},
    {:kept, "k", :kernel_died},
    {:begun, %{@command | id: "done"}},
    {:ended, "done", {:error, :remote_error}, 5},
    {:begun, %{@command | id: "dropped"}},
    {:forgotten, "dropped"},
    {:remembered, @ended},
    {:instance, "demo", %{@record | ref: "gone", name: nil, state: nil}},
    {:instance_gone, "demo", "gone"},
    {:function_gone, "demo", "none"},
    {:secret_gone, "demo", "none"},
    {:result_gone, "demo", "none"}
  ]

  setup do
    store = Path.join(System.tmp_dir!(), "bridge-foreign-#{System.unique_integer([:positive])}-#{System.pid()}")
    File.mkdir_p!(store)
    on_exit(fn -> File.rm_rf!(store) end)
    %{store: store}
  end

  defp write_log(store, terms) do
    File.write!(Path.join(store, "log.1"), [Log.header(:log, 1) | Enum.map(terms, &Log.frame(&1, 0))])
  end

  defp files(store), do: store |> File.ls!() |> Map.new(&{&1, File.read!(Path.join(store, &1))})

  # Not by its supervisor's start, which would end the test with it.
  defp try_open(store) do
    Process.flag(:trap_exit, true)
    cfg = %Config{name: :"Bridge.TestStore#{System.unique_integer([:positive])}", store: store}

    case SessionStore.start_link(cfg) do
      {:error, {:shutdown, error}} -> {:error, error}
      {:ok, pid} -> {:ok, pid, cfg}
    end
  end

  defp recover(store) do
    tables = Tables.new()
    result = Snapshot.recover(store, tables)
    Tables.delete(tables)
    result
  end

  test "every kind of fact is read, all in one batch and each in its own", %{store: store} do
    for batches <- [[@facts], Enum.map(@facts, &[&1])] do
      write_log(store, batches)
      assert {:ok, pid, cfg} = try_open(store)
      assert {:ok, [1, "a"], 3} = SessionStore.fetch(cfg, "demo", "n")
      assert [%{id: "done"}, %{id: "e"}] = for(%{status: :ended} = command <- SessionStore.journal(cfg), do: command)
      GenServer.stop(pid)
    end
  end

  describe "a frame that is no fact" do
    defp foreign do
      [
        nil,
        :hello,
        "a letter",
        %{},
        {:next},
        [nil],
        [[]],
        [{}],
        [{1, 2}],
        [{:unknown, "demo"}],
        [@session | :tail],
        # Of sessions
        [{:session, "demo", %{}}],
        [{:session, "", elem(@session, 2)}],
        [{:session, :demo, elem(@session, 2)}],
        [{:session, <<255>>, elem(@session, 2)}],
        [{:session, "demo", Map.put(elem(@session, 2), :more, 1)}],
        [{:session, "demo", %{elem(@session, 2) | used: 1.5}}],
        [{:session, "demo", %{elem(@session, 2) | used: Bitwise.bsl(1, 70)}}],
        [{:session, "demo", %{elem(@session, 2) | created: nil}}],
        [{:session, "demo", %{elem(@session, 2) | ttl: 0}}],
        [{:session, "demo", %{elem(@session, 2) | version: -1}}],
        [{:session, "demo", %{elem(@session, 2) | lm: "gpt"}}],
        [{:session, "demo", %{elem(@session, 2) | lm: %{model: "m"}}}],
        [{:session, "demo", %{elem(@session, 2) | lm: %{@lm | options: %{a: 1}}}}],
        [{:session_gone, "demo"}, {:session_gone, "demo"}],
        [@session, {:session_gone, "demo"}],
        # Of what is nobody's
        [{:variable, "elsewhere", "n", @put}],
        [{:type, "elsewhere", "n", %{}}],
        [{:type, "elsewhere", "n", nil}],
        [{:instance, "elsewhere", @record}],
        [{:function, "elsewhere", @function}],
        [{:secret, "elsewhere", "K", "sealed"}],
        [{:result, "elsewhere", "k", %{digest: "d", value: 1, command: "c", ended: 1}}],
        [{:begun, %{@command | session: "elsewhere"}}],
        [{:remembered, %{@ended | session: "elsewhere"}}],
        # Of variables
        [{:variable, "demo", "n", @put}],
        [{:variable, "demo", "n", %{@put | version: 0}}],
        [{:variable, "demo", "new", %{@put | version: 0}}],
        [{:variable, "demo", "new", %{@put | version: "1"}}],
        [{:variable, "demo", "new", %{@put | there: nil}}],
        [{:variable, "demo", "new", %{@put | type: nil}}],
        [{:variable, "demo", "new", %{@put | type: :list}}],
        [{:variable, "demo", "new", %{@put | size: -1}}],
        [{:variable, "demo", "new", %{@put | size: "9"}}],
        [{:variable, "demo", "new", %{@put | at: nil}}],
        [{:variable, "demo", "new", %{@put | written: "now"}}],
        [{:variable, "demo", "new", %{@put | restores: "1"}}],
        [{:variable, "demo", "new", Map.delete(@put, :restores)}],
        [{:variable, "demo", "new", Map.put(@put, :more, 1)}],
        [{:variable, "demo", "new", %{@deleted | value: 1}}],
        [{:variable, "demo", "new", %{@deleted | size: 1}}],
        [{:variable, "demo", "new", %{@put | value: self()}}],
        [{:variable, "demo", "new", %{@put | value: [1, %{"a" => {make_ref()}}]}}],
        [{:variable, "demo", "new", %{@put | value: &Kernel.inspect/1}}],
        [{:variable, "demo", "new", %{@put | value: [1 | 2]}}],
        [{:variable, "demo", "new", %{@put | value: <<1::3>>}}],
        [{:variable, "demo", nil, @put}],
        [{:variable, "demo", "", @put}],
        [{:variable, "demo", <<255>>, @put}],
        [{:type, "demo", "n", "integer"}],
        [{:type, "demo", "n", %{"default" => self()}}],
        # Of what else a session owns
        [{:instance, "demo", %{}}],
        [{:instance, "demo", Map.delete(@record, :cache)}],
        [{:instance, "demo", %{@record | ref: 1}}],
        [{:instance, "demo", %{@record | class: nil}}],
        [{:instance, "demo", %{@record | args: %{}}}],
        [{:instance, "demo", %{@record | args: [1 | 2]}}],
        [{:instance, "demo", %{@record | kwargs: []}}],
        [{:instance, "demo", %{@record | kwargs: %{a: 1}}}],
        [{:instance, "demo", %{@record | state: %{}}}],
        [{:instance, "demo", %{@record | name: :it}}],
        [{:instance, "demo", %{@record | methods: nil}}],
        [{:instance, "demo", %{@record | version: 0}}],
        [{:function, "demo", %{}}],
        [{:function, "demo", %{@function | name: nil}}],
        [{:function, "demo", %{@function | source: nil}}],
        [{:function, "demo", %{@function | source: "import os\n"}}],
        [{:function, "demo", %{@function | lm: nil}}],
        [{:function, "demo", %{@function | secrets: "K"}}],
        [{:secret, "demo", "K", nil}],
        [{:secret, "demo", :k, "sealed"}],
        [{:result, "demo", "k", 1}],
        [{:result, "demo", "k", %{digest: "d", value: 1, command: "c"}}],
        [{:result, "demo", "k", %{digest: "d", value: 1, command: "c", ended: nil}}],
        [{:result, "demo", "k", %{digest: "d", value: {:sealed, "x"}, command: nil, ended: 1}}],
        [{:result, "demo", "k", %{digest: "d", value: {:sealed, 1}, command: "c", ended: 1}}],
        # Of the journal
        [{:begun, %{}}],
        [{:begun, Map.delete(@command, :params)}],
        [{:begun, Map.delete(@command, :digest)}],
        [{:begun, %{@command | id: nil}}],
        [{:begun, %{@command | method: :call}}],
        [{:begun, %{@command | key: 1}}],
        [{:begun, %{@command | attempt: 0}}],
        [{:begun, %{@command | sealed: nil}}],
        [{:begun, %{@command | sealed: true, params: {:sealed, nil}}}],
        [{:begun, %{@command | began: nil}}],
        [{:begun, %{@command | status: :ended}}],
        [{:begun, %{@command | error: "it died"}}],
        [{:tried, "c", 0}],
        [{:tried, "c", "2"}],
        [{:kept, "c", "it died"}],
        [{:called, "c", 0, @call}],
        [{:called, "c", 1, %{}}],
        [{:called, "c", 1, %{@call | seq: "1"}}],
        [{:called, "c", 1, %{@call | method: nil}}],
        [{:called, "c", 1, %{@call | effect: 1}}],
        [{:called, "c", 1, %{@call | asked: {:sealed, []}}}],
        [{:answered, "c", "1", 1}],
        [{:answered, "c", 1, {:sealed, :x}}],
        [{:calls_gone, "c", 1}],
        [{:calls_gone, "c", [1 | 2]}],
        [{:ended, "c", :failed, 1}],
        [{:ended, "c", {:error, "no"}, 1}],
        [{:ended, "c", :ok, nil}],
        [{:remembered, @command}],
        [{:remembered, %{@ended | ended: nil}}],
        [{:remembered, %{@ended | calls: nil}}],
        [{:forgotten, 1}]
      ]
    end

    test "is refused, wherever it is, and says where", %{store: store} do
      log = Path.join(store, "log.1")
      snapshot = Path.join(store, "snapshot.2")

      for foreign <- foreign() do
        write_log(store, [@facts])
        at = File.stat!(log).size
        write_log(store, [@facts, foreign, [@session]])
        found = recover(store)
        assert match?({:error, %{name: :store_damaged}}, found), inspect(foreign)
        {:error, %{message: message}} = found
        assert message =~ "#{log}: what is at byte #{at} was not written by Bridge: "
        File.rm!(log)

        frames = Enum.map([@facts, foreign, :complete], &Log.frame(&1, 0))
        File.write!(snapshot, [Log.header(:snapshot, 2) | frames])
        File.write!(Path.join(store, "log.2"), Log.header(:log, 2))
        assert {:error, %{name: :store_damaged, message: message}} = recover(store)
        assert message =~ "#{snapshot}: what is at byte #{at} was not written by Bridge: "
        for path <- [snapshot, Path.join(store, "log.2")], do: File.rm!(path)
      end
    end

    test "keeps the store from being opened, and leaves the files as they are", %{store: store} do
      for foreign <- [[{:variable, "elsewhere", "n", @put}], [{:begun, %{}}], 1] do
        write_log(store, [@facts, foreign])
        before = files(store)
        assert {:error, %{name: :store_damaged, remedy: remedy}} = try_open(store)
        assert remedy =~ "the files were left as they are"
        assert files(store) == before
      end
    end

    test "is refused after the end, of a log and of a snapshot", %{store: store} do
      write_log(store, [@facts, {:next, 2}, [@session]])
      File.write!(Path.join(store, "log.2"), Log.header(:log, 2))
      assert {:error, %{name: :store_damaged, message: message}} = recover(store)
      assert message =~ "it comes after the end"

      File.rm!(Path.join(store, "log.1"))
      frames = Enum.map([@facts, :complete, [@session]], &Log.frame(&1, 0))
      File.write!(Path.join(store, "snapshot.2"), [Log.header(:snapshot, 2) | frames])
      assert {:error, %{name: :store_damaged, message: message}} = recover(store)
      assert message =~ "it comes after the end"
    end
  end

  # What nobody thought of: each part of each fact in turn, replaced by each of these, or left out.
  @odd [nil, true, :atom, 0, -1, 1.5, "", "text", <<255>>, [], [1], [1 | 2], {}, {:sealed, 1}, %{}, %{__struct__: 1}]

  test "whatever is taken of a file, its owner survives all that is asked of it" do
    changed =
      for {fact, i} <- Enum.with_index(@facts),
          fact <- changed(fact, 3),
          do: Enum.take(@facts, i) ++ [fact] ++ Enum.drop(@facts, i + 1)

    taken =
      Enum.filter(changed, fn facts ->
        tables = Tables.new()
        loaded = Tables.load(tables, facts)
        # What is taken can be written anew, and read again.
        again = Tables.new()
        if loaded == :ok, do: assert(:ok == Tables.load(again, Enum.to_list(Tables.facts(tables))))
        for image <- [tables, again], do: Tables.delete(image)
        loaded == :ok
      end)

    # Both ways.
    assert length(taken) in 1000..div(length(changed), 2)
    cfg = TestStores.start()
    pid = Process.whereis(Config.process(cfg.name, :store))

    for facts <- taken, {:session, id, _put} <- Enum.take(facts, 1) do
      assert {:ok, [^id]} = GenServer.call(pid, {:take, [{id, facts}]})
      use_all(cfg, id)
      assert Process.alive?(pid), inspect(facts -- @facts)
    end
  end

  defp changed(_term, 0), do: []

  defp changed(tuple, depth) when is_tuple(tuple) do
    for i <- 0..(tuple_size(tuple) - 1)//1,
        part <- @odd ++ changed(elem(tuple, i), depth - 1),
        do: put_elem(tuple, i, part)
  end

  defp changed(map, depth) when is_map(map) do
    for {key, value} <- map,
        change <- [:without | Enum.map(@odd ++ changed(value, depth - 1), &{:with, &1})] do
      with {:with, part} <- change, do: Map.put(map, key, part), else: (:without -> Map.delete(map, key))
    end
  end

  defp changed(list, depth) when is_list(list) do
    for {item, i} <- Enum.with_index(list), part <- @odd ++ changed(item, depth - 1), do: List.replace_at(list, i, part)
  end

  defp changed(_leaf, _depth), do: []

  defp use_all(cfg, id) do
    on = [bridge: cfg.name]

    for use <- [
          fn -> SessionStore.set_type(id, "n", :list, on) end,
          fn -> SessionStore.set_variable(id, "n", [2], on) end,
          fn -> SessionStore.revert(id, "n", 1, on) end,
          fn -> SessionStore.delete_variable(id, "n", on) end,
          fn -> SessionStore.put_function(cfg, id, %{name: "f", source: "def f(): return 1\n"}) end,
          fn -> SessionStore.delete_function(cfg, id, "f") end,
          fn -> SessionStore.name_instance(cfg, id, "r", "named") end,
          fn -> SessionStore.commit(cfg, nil, id, [{:instance, @record, 1}]) end,
          fn -> SessionStore.commit(cfg, nil, id, [{:delete_instance, "r"}]) end,
          fn -> SessionStore.put_lm(cfg, id, @lm) end,
          fn -> Secrets.all(cfg, id) end,
          fn -> Secrets.for_command(cfg, id, ["K"]) end,
          fn -> Secrets.put(id, "K", "0123456789", on) end,
          fn -> Secrets.delete(id, "K", on) end,
          fn -> for(key <- ["k", "s"], do: SessionStore.result(cfg, id, key)) end,
          fn -> for(id <- ["c", "s", "k"], do: SessionStore.command(cfg, id)) end,
          fn -> SessionStore.command_with_key(cfg, id, "kept") end,
          fn -> SessionStore.interrupted(cfg) end,
          fn -> SessionStore.begin_command(cfg, %{@command | attempt: 3}) end,
          fn -> SessionStore.record_call(cfg, "c", 3, @call, sync: true) end,
          fn -> SessionStore.record_reply(cfg, "c", 1, 1) end,
          fn -> SessionStore.commit(cfg, "c", id, [], %{key: "k", digest: "d", value: 1}) end,
          fn -> SessionStore.begin_command(cfg, %{@command | id: "s"}) end,
          fn -> SessionStore.end_command(cfg, "s", {:error, :kernel_died}, keep: true) end,
          fn -> SessionStore.drop(cfg, "s") end,
          fn -> SessionStore.journal(cfg) end,
          fn -> SessionStore.sweep(cfg) end,
          fn -> SessionStore.create_session(id, [ttl: 1_000_000] ++ on) end,
          fn -> SessionStore.describe(id, on) end,
          fn -> for(id <- elem(SessionStore.sessions(on), 1), do: :ok = SessionStore.delete_session(id, on)) end
        ] do
      # Whoever asks for what is odd may fail of it; nobody else.
      try do
        use.()
      rescue
        _odd in [ArgumentError, FunctionClauseError, KeyError, ArithmeticError, Protocol.UndefinedError] -> :ok
      end
    end
  end

  describe "atoms that nobody knows" do
    # In the external format, for here they must not be made.
    defp atoms(numbers, seed) do
      list = for n <- numbers, name = "foreign-#{seed}-#{n}", do: <<119, byte_size(name), name::binary>>
      [<<108, length(list)::32>>, list, 106]
    end

    defp frame(terms) do
      payload = IO.iodata_to_binary([131, terms])
      size = byte_size(payload)
      <<"BrgF", size::64, :erlang.crc32([<<size::64, 0::64>>, payload])::32, 0::64, payload::binary>>
    end

    # A variable whose value is a list of atoms.
    defp with_atoms(version, atoms) do
      put = %{@put | version: version, value: :in_place_of_this}
      placeholder = <<119, 16, "in_place_of_this">>
      latin = <<100, 16::16, "in_place_of_this">>
      <<131, written::binary>> = :erlang.term_to_binary([@session, {:variable, "demo", "n", put}])
      [before, rest] = :binary.split(written, [placeholder, latin])
      frame([before, atoms, rest])
    end

    defp known?(name) do
      String.to_existing_atom(name)
      true
    rescue
      ArgumentError -> false
    end

    defp write_frames(store, file, frames) do
      File.write!(Path.join(store, "log.#{file}"), [Log.header(:log, file) | frames])
    end

    test "are refused if they are many, before any of them is made", %{store: store} do
      write_frames(store, 1, [with_atoms(1, atoms(1..50_000, "one"))])
      before = files(store)
      assert {:error, %{name: :store_damaged, message: message}} = try_open(store)
      assert message =~ "log.1: what is at byte 27 was not written by Bridge"
      assert files(store) == before
      refute Enum.any?(1..50_000, &known?("foreign-one-#{&1}"))
    end

    test "are refused if they are many in many frames, and in many files", %{store: store} do
      frames = for n <- 1..50, do: with_atoms(n, atoms((n * 1000)..(n * 1000 + 999), "many"))
      write_frames(store, 1, frames)
      assert {:error, %{name: :store_damaged}} = try_open(store)
      refute known?("foreign-many-12000")

      for {file, frames} <- Enum.zip(1..10, Enum.chunk_every(frames, 5)) do
        write_frames(store, file, frames ++ [Log.frame({:next, file + 1}, 0)])
      end

      assert {:error, %{name: :store_damaged, message: message}} = try_open(store)
      assert message =~ "was not written by Bridge"
      refute known?("foreign-many-45000")
    end

    test "are read if they are few: they may be of code that is not loaded", %{store: store} do
      write_frames(store, 1, [with_atoms(1, atoms(1..3, "few"))])
      assert {:ok, pid, cfg} = try_open(store)
      assert {:ok, atoms, 1} = SessionStore.fetch(cfg, "demo", "n")
      assert Enum.map(atoms, &Atom.to_string/1) == ["foreign-few-1", "foreign-few-2", "foreign-few-3"]
      GenServer.stop(pid)
    end

    test "are found in every term that there is", %{store: store} do
      big = Bitwise.bsl(1, 3000)

      kept = %{
        1.5 => [self(), make_ref(), hd(Port.list()), &Kernel.inspect/1, fn -> {store, big} end],
        big => {-1, 300, big, -Bitwise.bsl(1, 70), <<1::3>>, 'text', [1 | 2], Tuple.duplicate(0, 300)}
      }

      # An atom at its end that is not known is found by whoever finds what each part before it is.
      <<131, terms::binary>> = :erlang.term_to_binary([kept])
      whole = binary_part(terms, 0, byte_size(terms) - 1)
      budget = Bridge.Store.Atoms.budget()
      unknown = <<119, 13, "foreign-every">>
      assert {:ok, [found | atom]} = Bridge.Store.Atoms.decode(<<131, whole::binary, unknown::binary>>, budget)
      assert {inspect(found), Atom.to_string(atom)} == {inspect(kept), "foreign-every"}
      assert :counters.get(budget, 1) == 9_999

      for cut <- 1..(byte_size(whole) - 1) do
        assert :error = Bridge.Store.Atoms.decode(<<131, binary_part(whole, 0, cut)::binary>>, budget)
      end
    end
  end

  test "what could not be read again is not written", %{store: store} do
    cfg = TestStores.start(store: store)
    {:ok, 1} = SessionStore.set_variable("demo", "n", 1, bridge: cfg.name)
    :ok = SessionStore.begin_command(cfg, %{id: "c-1", session: "demo"})
    {:ok, 2} = SessionStore.set_variable("demo", "n", 2, bridge: cfg.name)
    log = files(store)["log.1"]
    assert {:error, %{name: :internal_error, message: message}} = SessionStore.record_call(cfg, "c-1", 1, %{asked: 1})
    assert message =~ "this could not be read again, and is not kept"
    assert {:error, %{name: :internal_error}} = SessionStore.tried(cfg, "c-1", 0)
    assert {:error, %{name: :internal_error}} = SessionStore.begin_command(cfg, %{id: "", session: "demo"})
    assert {:error, %{name: :internal_error}} = SessionStore.begin_command(cfg, %{id: "c", session: "demo", key: 1})
    assert {:error, %{name: :invalid_params}} = SessionStore.put_lm(cfg, "demo", %{@lm | adapter: :chat})
    assert {:ok, 2} = SessionStore.get_variable("demo", "n", bridge: cfg.name)
    assert files(store)["log.1"] == log
  end
end
