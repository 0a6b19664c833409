defmodule Bridge.Store.DurableTest do
  use ExUnit.Case, async: true

  import ExUnit.CaptureLog

  alias Bridge.{Config, SessionStore, TestStores}
  alias Bridge.Store.{Disk, Log, Snapshot, Tables}

  setup do
    directory = Path.join(System.tmp_dir!(), "bridge-store-#{System.unique_integer([:positive])}-#{System.pid()}")
    on_exit(fn -> File.rm_rf!(directory) end)
    %{directory: directory, store: Path.join(directory, "store")}
  end

  defp start(store, opts \\ []), do: TestStores.start([store: store] ++ opts)
  defp on(cfg), do: [bridge: cfg.name]

  defp set(cfg, name, value) do
    {:ok, version} = SessionStore.set_variable("demo", name, value, on(cfg))
    version
  end

  # Not by its supervisor's start, which would end the test with it.
  defp try_open(store) do
    Process.flag(:trap_exit, true)
    cfg = %Config{name: :"Bridge.TestStore#{System.unique_integer([:positive])}", store: store}
    result = SessionStore.start_link(cfg)
    with {:error, {:shutdown, error}} <- result, do: {:error, error}
  end

  defp files(store), do: store |> File.ls!() |> Map.new(&{&1, File.read!(Path.join(store, &1))})

  describe "what was acknowledged" do
    test "is there again: variables with their types and history, functions, instances, the journal", %{store: store} do
      cfg = start(store)
      for n <- 1..3, do: ^n = set(cfg, "n", n)
      {:ok, _} = SessionStore.delete_variable("demo", "n", on(cfg))
      value = %{"a" => [{1, :nan}], "b" => Bridge.Bytes.new(<<0, 255>>), "c" => ~U[2024-01-02 03:04:05Z]}
      set(cfg, "kept", value)
      {:ok, schema} = SessionStore.set_type("demo", "typed", :integer, [ge: 1, default: 7] ++ on(cfg))
      :ok = SessionStore.put_function(cfg, "demo", %{name: "f", source: "def f(): pass\n", lm: true, secrets: ["K"]})
      :ok = SessionStore.put_lm(cfg, "demo", %{model: "m", api_base: nil, adapter: nil, options: %{}})

      record = %{
        ref: "r-1",
        class: "pkg.It",
        args: [1],
        kwargs: %{},
        state: %{adapter: "bridge", value: 1, sha256: nil},
        name: "it"
      }

      {:ok, _} = SessionStore.commit(cfg, nil, "demo", [{:instance, record, nil}])
      :ok = SessionStore.begin_command(cfg, %{id: "done", session: "demo"})
      {:ok, _} = SessionStore.commit(cfg, "done", "demo", [], %{key: "k", digest: "d", value: {1, 2}})
      :ok = SessionStore.begin_command(cfg, %{id: "cut", session: "demo", params: [1], method: "run"})

      :ok =
        SessionStore.record_call(cfg, "cut", 1, %{seq: nil, method: "tool.call", asked: "x", effect: true}, sync: true)

      :ok = SessionStore.record_reply(cfg, "cut", 1, 42)

      :ok =
        SessionStore.record_call(cfg, "cut", 2, %{seq: nil, method: "tool.call", asked: "y", effect: true}, sync: true)

      {:ok, described} = SessionStore.describe("demo", on(cfg))
      :ok = TestStores.stop(cfg)

      again = start(store)
      assert {:ok, ^value} = SessionStore.get_variable("demo", "kept", on(again))
      assert {:error, %{name: :not_found}} = SessionStore.get_variable("demo", "n", on(again))
      assert {:ok, history} = SessionStore.history("demo", "n", on(again))
      assert Enum.map(history, &{&1.version, &1.value}) == [{1, 1}, {2, 2}, {3, 3}, {4, nil}]
      assert {:ok, %{value: 7, schema: ^schema}} = SessionStore.variable("demo", "typed", on(again))
      assert {:ok, %{lm: true, secrets: ["K"]}} = SessionStore.function(again, "demo", "f")
      assert %{model: "m"} = SessionStore.lm(again, "demo")
      assert {:ok, %{version: 1, state: %{value: 1}}} = SessionStore.instance(again, "demo", "it")
      assert {:ok, %{value: {1, 2}}} = SessionStore.result(again, "demo", "k")
      assert [%{id: "cut", method: "run"}] = SessionStore.interrupted(again)
      assert {:ok, %{params: [1], calls: [%{reply: {:ok, 42}}, %{reply: :error}]}} = SessionStore.command(again, "cut")
      assert [%{id: "done", status: :ended}, %{id: "cut", status: :interrupted}] = SessionStore.journal(again)
      assert {:ok, ^described} = SessionStore.describe("demo", on(again))
      assert {:ok, 5} = SessionStore.set_variable("demo", "n", 5, on(again))
    end

    test "how often an interrupted command was tried is there, from the log and from a snapshot of it", context do
      %{store: store} = context
      cfg = start(store)
      :ok = SessionStore.begin_command(cfg, %{id: "c", session: "demo"})
      # Nobody waits for the disk.
      disk = Disk.process(:sys.get_state(Config.process(cfg.name, :store)).disk)
      :ok = :sys.suspend(disk)
      for attempt <- 2..4, do: :ok = SessionStore.tried(cfg, "c", attempt)
      :ok = :sys.resume(disk)
      # The host dies, with what was written until then.
      set(cfg, "n", 1)
      Process.exit(Process.whereis(Config.process(cfg.name, :store)), :kill)
      TestStores.stop(cfg)

      again = start(store, compact_bytes: 2_000)
      assert [%{id: "c", attempt: 4}] = SessionStore.interrupted(again)
      for n <- 2..60, do: set(again, "n", n)
      :ok = wait_for_snapshot(store, 1)
      :ok = TestStores.stop(again)
      assert [%{id: "c", attempt: 4}] = SessionStore.interrupted(start(store))
    end

    test "is in the file when the function returns, though the store is never closed", %{
      store: store,
      directory: directory
    } do
      cfg = start(store)

      for n <- 1..20 do
        ^n = set(cfg, "n", n)
        copy = Path.join(directory, "copy#{n}")
        File.cp_r!(store, copy)
        again = start(copy)
        assert {:ok, ^n} = SessionStore.get_variable("demo", "n", on(again))
        assert Path.wildcard(copy <> "/owner") == [copy <> "/owner"]
      end
    end

    test "is there however far the log got; and of a commit there is all or nothing", %{
      store: store,
      directory: directory
    } do
      cfg = start(store)
      {:ok, _} = SessionStore.create_session("demo", on(cfg))
      log = Path.join(store, "log.1")

      # How long the log was when each commit was acknowledged.
      acknowledged =
        for n <- 1..4 do
          {:ok, _} =
            SessionStore.update_variables(
              "demo",
              %{"a" => n, "b" => n, "text" => String.duplicate("x", n * 7)},
              on(cfg)
            )

          {n, File.stat!(log).size}
        end

      whole = File.read!(log)
      cut = Path.join(directory, "cut")
      File.mkdir_p!(cut)

      for bytes <- Log.header_bytes()..byte_size(whole) do
        File.write!(Path.join(cut, "log.1"), binary_part(whole, 0, bytes))
        tables = Tables.new()
        assert {:ok, %{cut: at}} = Snapshot.recover(cut, tables)
        expected = for({n, size} <- acknowledged, size <= bytes, do: n) |> List.last(0)
        assert {at, values(tables, ["a", "b"])} == {at, [expected, expected]}, "cut at byte #{bytes}"
        Tables.delete(tables)

        # What was cut off is gone for good: it opens whole from then on, and goes on.
        if rem(bytes, 173) == 0 do
          log = capture_log(fn -> :ok = write_another(cut) end)
          assert log =~ "a write that was cut short at byte #{at} was removed" or at == nil
          tables = Tables.new()
          assert {:ok, %{cut: nil}} = Snapshot.recover(cut, tables)
          assert [expected, expected, "on"] == values(tables, ["a", "b", "more"])
          Tables.delete(tables)
        end
      end
    end

    defp write_another(store) do
      cfg = start(store)
      set(cfg, "more", "on")
      TestStores.stop(cfg)
    end

    defp values(tables, names) do
      for name <- names, do: with({:ok, value, _} <- Tables.value(tables, "demo", name), do: value, else: (:error -> 0))
    end

    test "survives the death of the process that wrote it, at any moment", %{store: store} do
      ebin = SessionStore |> :code.which() |> Path.dirname()

      writer = """
      cfg = %Bridge.Config{name: Writer, store: #{inspect(store)}}
      {:ok, _} = Bridge.SessionStore.start_link(cfg, compact_bytes: 20_000)
      Bridge.Config.put(cfg)
      first = with {:ok, n} <- Bridge.SessionStore.get_variable("demo", "a", bridge: Writer), do: n, else: (_ -> 0)
      for n <- (first + 1)..1_000_000 do
        {:ok, _} = Bridge.SessionStore.update_variables("demo", %{"a" => n, "b" => n}, bridge: Writer)
        IO.puts(n)
      end
      """

      for lines <- [3, 400] do
        port =
          Port.open({:spawn_executable, System.find_executable("elixir")}, [
            :binary,
            :exit_status,
            line: 100,
            args: ["-pa", ebin, "-e", writer]
          ])

        {:os_pid, pid} = Port.info(port, :os_pid)
        told = for _ <- 1..lines, do: receive(do: ({^port, {:data, {:eol, line}}} -> String.to_integer(line)))
        assert {:error, %{name: :store_locked, message: message}} = try_open(store)
        assert message =~ "in another process, #{pid}"
        {_, 0} = System.cmd("kill", ["-9", "#{pid}"])
        told = told ++ rest(port)

        cfg = start(store)
        {:ok, n} = SessionStore.get_variable("demo", "a", on(cfg))
        assert {:ok, ^n} = SessionStore.get_variable("demo", "b", on(cfg))
        assert n >= List.last(told)
        assert {:ok, %{version: ^n}} = SessionStore.variable("demo", "a", on(cfg))
        :ok = TestStores.stop(cfg)
      end
    end
  end

  defp rest(port) do
    receive do
      {^port, {:data, {:eol, line}}} -> [String.to_integer(line) | rest(port)]
      {^port, {:data, {:noeol, _cut}}} -> rest(port)
      {^port, {:exit_status, _status}} -> []
    end
  end

  describe "damage" do
    test "in the middle is refused, and the files are left as they are", %{store: store, directory: directory} do
      cfg = start(store)
      sizes = for n <- 1..4, do: set(cfg, "n", n) && File.stat!(Path.join(store, "log.1")).size
      :ok = TestStores.stop(cfg)
      whole = File.read!(Path.join(store, "log.1"))

      broken = Path.join(directory, "broken")
      File.mkdir_p!(broken)

      # Every byte of the header and of all that was synced when the last batch was written.
      for at <- 0..(Enum.at(sizes, 2) - 1) do
        <<before::binary-size(at), byte, rest::binary>> = whole
        File.write!(Path.join(broken, "log.1"), [before, Bitwise.bxor(byte, 1), rest])
        tables = Tables.new()
        assert {:error, %{name: :store_damaged}} = Snapshot.recover(broken, tables), "byte #{at}"
        Tables.delete(tables)
      end

      before = files(broken)
      assert {:error, %{name: :store_damaged, remedy: remedy}} = try_open(broken)
      assert remedy =~ "the files were left as they are"
      assert files(broken) == before
    end

    test "of the last batch is seen too, if the store was closed", %{store: store} do
      cfg = start(store)
      for n <- 1..3, do: set(cfg, "n", n)
      size = File.stat!(Path.join(store, "log.1")).size
      :ok = TestStores.stop(cfg)
      path = Path.join(store, "log.1")
      <<before::binary-size(size - 2), byte, rest::binary>> = File.read!(path)
      File.write!(path, [before, Bitwise.bxor(byte, 1), rest])
      assert {:error, %{name: :store_damaged, message: message}} = try_open(store)
      assert message =~ ~r/log\.1: it is damaged at byte \d+/
    end

    test "a log or a snapshot that is missing, short or another's is refused", %{store: store} do
      cfg = start(store, compact_bytes: 2_000)
      for n <- 1..100, do: set(cfg, "n", n)
      :ok = wait_for_snapshot(store, 1)
      :ok = TestStores.stop(cfg)
      # What a snapshot that was just made has not removed yet is removed now.
      :ok = TestStores.stop(start(store))
      [snapshot] = Path.wildcard(store <> "/snapshot.*")
      logs = Path.wildcard(store <> "/log.*")

      for path <- [snapshot | logs], change <- [:gone, :short, :empty, :other] do
        whole = File.read!(path)

        case change do
          :gone -> File.rm!(path)
          :short when path == snapshot -> File.write!(path, binary_part(whole, 0, byte_size(whole) - 1))
          :short -> File.write!(path, binary_part(whole, 0, 10))
          :empty -> File.write!(path, "")
          :other -> File.write!(path, "SQLite format 3\0" <> whole)
        end

        before = files(store)
        assert {:error, %{name: :store_damaged}} = try_open(store)
        assert files(store) == before
        File.write!(path, whole)
      end

      again = start(store)
      assert {:ok, 100} = SessionStore.get_variable("demo", "n", on(again))
    end

    test "a log whose next was made, and not begun, is gone on with; a torn end that was passed is refused", context do
      %{store: store} = context
      cfg = start(store)
      for n <- 1..3, do: set(cfg, "n", n)
      path = Path.join(store, "log.1")
      whole = File.read!(path)
      :ok = TestStores.stop(cfg)
      next = IO.iodata_to_binary(Log.frame({:next, 2}, byte_size(whole)))
      header = Log.header(:log, 2)

      # Every moment of the way from one log to the next.
      for bytes <- 0..(byte_size(next) - 1) do
        File.write!(path, [whole, binary_part(next, 0, bytes)])
        File.write!(Path.join(store, "log.2"), header)
        tables = Tables.new()
        assert {:ok, %{generation: 1, leftovers: [unused]}} = Snapshot.recover(store, tables)
        assert {Path.basename(unused), values(tables, ["n"])} == {"log.2", [3]}
        Tables.delete(tables)

        File.write!(Path.join(store, "log.2"), [header, Log.frame([], 0)])
        assert {:error, %{name: :store_damaged}} = Snapshot.recover(store, Tables.new())
      end

      File.write!(Path.join(store, "log.2"), header)
      capture_log(fn -> :ok = write_another(store) end)
      assert Enum.sort(File.ls!(store)) == ["log.1"]

      File.write!(path, [whole, next])
      assert {:error, %{name: :store_damaged, message: message}} = Snapshot.recover(store, Tables.new())
      assert message =~ "log.2: it is missing"
      File.write!(Path.join(store, "log.2"), header)
      assert {:ok, %{generation: 2, cut: nil}} = Snapshot.recover(store, Tables.new())
    end

    test "a newer format is refused", %{store: store} do
      cfg = start(store)
      set(cfg, "n", 1)
      :ok = TestStores.stop(cfg)
      path = Path.join(store, "log.1")
      <<magic::binary-size(12), 1::16, kind, generation::64, _crc::32, rest::binary>> = File.read!(path)
      header = <<magic::binary, 2::16, kind, generation::64>>
      File.write!(path, [header, <<:erlang.crc32(header)::32>>, rest])
      assert {:error, %{name: :store_damaged, message: message}} = try_open(store)
      assert message =~ "its format has version 2, this Bridge reads version 1"
    end

    test "a directory of something else is refused, and so is a file", %{store: store, directory: directory} do
      File.mkdir_p!(store)
      File.write!(Path.join(store, "letter.txt"), "Dear …")
      assert {:error, %{name: :store_damaged, message: message}} = try_open(store)
      assert message =~ "is no store: it holds letter.txt"
      assert File.ls!(store) == ["letter.txt"]
      assert {:error, %{name: :store_failed}} = try_open(Path.join(store, "letter.txt"))
      assert {:error, %{name: :store_failed}} = try_open(Path.join([directory, "store", "letter.txt", "x"]))
    end
  end

  describe "the owner" do
    test "a store has one; who asks for it is told its process", %{store: store} do
      cfg = start(store)
      set(cfg, "n", 1)
      assert {:error, %{name: :store_locked, message: message}} = try_open(store)
      assert message =~ "is open already, in this process (#{System.pid()})"
      set(cfg, "n", 2)
      :ok = TestStores.stop(cfg)
      refute File.exists?(Path.join(store, "owner"))
      again = start(store)
      assert {:ok, 2} = SessionStore.get_variable("demo", "n", on(again))
    end

    test "an owner that dies is started again by its supervisor, with all that was acknowledged", %{store: store} do
      cfg = start(store)
      set(cfg, "n", 1)
      pid = Process.whereis(Config.process(cfg.name, :store))
      Process.exit(pid, :kill)
      :ok = until_another(cfg, pid)
      assert {:ok, 2} = SessionStore.set_variable("demo", "n", 2, on(cfg))
      assert {:ok, 2} = SessionStore.get_variable("demo", "n", on(cfg))
    end

    test "a lock of a process that is no more, or that says nothing, is taken over", %{store: store} do
      cfg = start(store)
      set(cfg, "n", 1)
      owner = File.read!(Path.join(store, "owner"))
      :ok = TestStores.stop(cfg)

      for stale <- [
            "",
            "nothing",
            String.replace(owner, ~r/started .*/, "started 1"),
            String.replace(owner, ~r/^pid .*/, "pid 0")
          ] do
        File.write!(Path.join(store, "owner"), stale)
        assert {:ok, pid} = try_open(store)
        GenServer.stop(pid)
      end

      File.write!(Path.join(store, "owner"), String.replace(owner, ~r/host .*/, "host another-machine"))
      assert {:error, %{name: :store_locked, remedy: remedy}} = try_open(store)
      assert remedy =~ "If that machine is no more, delete #{store}/owner"
    end

    test "of many that open it at once one has it, though they find a lock that is stale", %{store: store} do
      cfg = start(store)
      set(cfg, "n", 1)
      owner = File.read!(Path.join(store, "owner"))
      :ok = TestStores.stop(cfg)

      for _round <- 1..10 do
        File.write!(Path.join(store, "owner"), String.replace(owner, ~r/started .*/, "started 1"))
        test = self()

        openers =
          for _ <- 1..6 do
            spawn_link(fn ->
              receive do: (:go -> :ok)
              result = try_open(store)
              send(test, {:tried, self(), result})
              receive do: (:end -> :ok)
              with {:ok, pid} <- result, do: GenServer.stop(pid)
              send(test, {:ended, self()})
            end)
          end

        for opener <- openers, do: send(opener, :go)
        results = for opener <- openers, do: receive(do: ({:tried, ^opener, result} -> result))
        assert [_one] = for({:ok, pid} <- results, do: pid)
        for {:error, error} <- results, do: assert(error.name == :store_locked)
        for opener <- openers, do: send(opener, :end) && receive(do: ({:ended, ^opener} -> :ok))
      end
    end
  end

  describe "snapshots" do
    test "the log is made a snapshot while writers go on, and nothing is lost", %{store: store} do
      cfg = start(store, compact_bytes: 10_000)
      :ok = Bridge.Secrets.put("demo", "KEY", "value", on(cfg))
      :ok = SessionStore.begin_command(cfg, %{id: "cut", session: "demo", params: [1]})

      :ok =
        SessionStore.record_call(cfg, "cut", 1, %{seq: nil, method: "tool.call", asked: "x", effect: false}, sync: true)

      1..4
      |> Task.async_stream(fn k -> for n <- 1..300, do: set(cfg, "v#{k}", n) end, timeout: :infinity)
      |> Stream.run()

      :ok = wait_for_snapshot(store, 2)
      {:ok, described} = SessionStore.describe("demo", on(cfg))
      {:ok, variables} = SessionStore.variables("demo", on(cfg))
      {:ok, history} = SessionStore.history("demo", "v1", on(cfg))
      journal = for command <- SessionStore.journal(cfg), do: command.id
      :ok = TestStores.stop(cfg)

      again = start(store)
      assert [_one] = Path.wildcard(store <> "/snapshot.*")
      assert {:ok, ^described} = SessionStore.describe("demo", on(again))
      assert {:ok, ^variables} = SessionStore.variables("demo", on(again))
      assert {:ok, ^history} = SessionStore.history("demo", "v1", on(again))
      assert journal == for(command <- SessionStore.journal(again), do: command.id)
      assert {:ok, %{calls: [%{asked: "x"}]}} = SessionStore.command(again, "cut")
      assert {:ok, %{"KEY" => "value"}} = Bridge.Secrets.for_command(again, "demo", ["KEY"])
    end

    test "a copy of the directory taken at any moment opens with all that was acknowledged, or is refused", context do
      %{store: store, directory: directory} = context
      cfg = start(store, compact_bytes: 3_000)
      copy = Path.join(directory, "copy")

      opened =
        for n <- 1..150, set(cfg, "n", n), rem(n, 5) == 0, copied?(store, copy) do
          tables = Tables.new()

          result =
            case Snapshot.recover(copy, tables) do
              {:ok, _found} ->
                assert {:ok, ^n, ^n} = Tables.value(tables, "demo", "n")
                :opened

              # A file went while the others were copied: that is seen, and not taken for all there was.
              {:error, error} ->
                assert error.name == :store_damaged
                :refused
            end

          Tables.delete(tables)
          result
        end

      assert :opened in opened
    end

    # Not, if a file went before it could be copied.
    defp copied?(store, copy) do
      File.rm_rf!(copy)
      {_out, status} = System.cmd("cp", ["-r", store, copy], stderr_to_stdout: true)
      status == 0
    end

    test "files that a snapshot has made of no use, and drafts, are removed when the store is opened", %{store: store} do
      cfg = start(store, compact_bytes: 2_000)
      for n <- 1..60, do: set(cfg, "n", n)
      :ok = wait_for_snapshot(store, 1)
      :ok = TestStores.stop(cfg)
      snapshot = store |> Path.join("snapshot.*") |> Path.wildcard() |> hd()
      File.write!(Path.join(store, "log.1"), "left behind")
      draft = Path.join(store, ".#{Path.basename(snapshot)}.0123456789abcdef")
      File.mkdir!(draft)
      File.write!(Path.join(draft, "draft"), "half")
      again = start(store)
      assert {:ok, 60} = SessionStore.get_variable("demo", "n", on(again))
      assert Enum.filter(File.ls!(store), &(&1 == "log.1" or String.starts_with?(&1, "."))) == []
    end
  end

  describe "a disk that takes nothing more" do
    test "fails the write that waits and all after it, and says why", %{store: store} do
      cfg = start(store)
      set(cfg, "n", 1)
      disk = :sys.get_state(Config.process(cfg.name, :store)).disk
      # What the file system would do when it is full.
      :sys.replace_state(Disk.process(disk), fn state ->
        {:ok, full} = :file.open("/dev/full", [:append, :raw, :binary])
        %{state | file: full}
      end)

      log =
        capture_log(fn ->
          assert {:error, %{name: :store_failed, message: message}} = SessionStore.set_variable("demo", "n", 2, on(cfg))
          assert message =~ "no space left on device"
          assert {:error, %{name: :store_failed}} = SessionStore.set_variable("demo", "n", 3, on(cfg))
          assert {:error, %{name: :store_failed}} = SessionStore.begin_command(cfg, %{id: "c", session: "demo"})
        end)

      assert log =~ "could not be written"
      :ok = TestStores.stop(cfg)
      again = start(store)
      assert {:ok, 1} = SessionStore.get_variable("demo", "n", on(again))
    end
  end

  test "many writers share a sync", %{store: store} do
    cfg = start(store)
    {:ok, _} = SessionStore.create_session("demo", on(cfg))
    pid = Disk.process(:sys.get_state(Config.process(cfg.name, :store)).disk)
    # It stops at its next batch, so that all the others wait together.
    :erlang.suspend_process(pid)
    writers = for n <- 1..200, do: Task.async(fn -> set(cfg, "v#{n}", n) end)
    :ok = until_waiting(pid, 200)
    :erlang.trace(pid, true, [:call])
    :erlang.trace_pattern({:prim_file, :datasync, 1}, true, [])
    :erlang.resume_process(pid)
    assert writers |> Task.await_many(60_000) |> Enum.uniq() == [1]
    :erlang.trace_pattern({:prim_file, :datasync, 1}, false, [])

    syncs =
      for _ <-
            Stream.repeatedly(fn -> receive(do: ({:trace, ^pid, :call, _} -> 1), after: (0 -> nil)) end)
            |> Enum.take_while(& &1),
          do: 1

    assert length(syncs) == 1
  end

  defp until_another(cfg, pid) do
    case Process.whereis(Config.process(cfg.name, :store)) do
      # It answers when all is read.
      another when is_pid(another) and another != pid -> if :sys.get_state(another), do: :ok
      _not_yet -> until_another(cfg, pid)
    end
  end

  defp until_waiting(pid, count) do
    {:message_queue_len, waiting} = Process.info(pid, :message_queue_len)
    if waiting >= count, do: :ok, else: until_waiting(pid, count)
  end

  defp wait_for_snapshot(store, least) do
    numbers =
      for path <- Path.wildcard(store <> "/snapshot.*"),
          do: path |> Path.extname() |> String.trim_leading(".") |> String.to_integer()

    if Enum.any?(numbers, &(&1 > least)), do: :ok, else: wait_for_snapshot(store, least)
  end
end
