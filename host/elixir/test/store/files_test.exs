defmodule Bridge.Store.FilesTest do
  use ExUnit.Case, async: true

  alias Bridge.{Config, Secrets, SessionStore}
  alias Bridge.Store.{Exchange, Files}

  setup do
    directory = Path.join(System.tmp_dir!(), "bridge-files-#{System.unique_integer([:positive])}-#{System.pid()}")
    File.mkdir_p!(directory)
    on_exit(fn -> File.rm_rf!(directory) end)
    %{directory: directory}
  end

  defp mode(path), do: Bitwise.band(File.lstat!(path).mode, 0o777)

  test "a file is there whole, or what was there before is", %{directory: directory} do
    path = Path.join(directory, "file")
    assert :ok = Files.write(path, ["on", "e"])

    assert {:error, :enoent} =
             Files.stream(path, Stream.map(1..2, &if(&1 == 2, do: taken_away(directory), else: "two")))

    assert {File.read!(path), mode(path)} == {"one", 0o600}
    assert :ok = Files.stream(path, ["t", "wo"])
    assert {:error, :eexist} = Files.create(path, "three")
    assert File.read!(path) == "two"
    assert :ok = Files.create(path <> "2", "three")
    assert {File.read!(path <> "2"), mode(path <> "2")} == {"three", 0o600}
    assert {:error, :enoent} = Files.write(Path.join([directory, "none", "file"]), "")
    assert Enum.sort(File.ls!(directory)) == ["file", "file2"]
  end

  defp taken_away(directory) do
    [draft] = Path.wildcard(directory <> "/.file.*/draft", match_dot: true)
    assert {mode(draft), mode(Path.dirname(draft))} == {0o600, 0o700}
    File.rm!(draft)
    File.rmdir!(Path.dirname(draft))
    "three"
  end

  # All of it: a store's log, lock, snapshot and key, and an export.
  defp everything(directory, name) do
    cfg = %Config{name: name, store: Path.join(directory, "store")}
    {:ok, pid} = SessionStore.start_link(cfg, compact_bytes: 2_000)
    Config.put(cfg)
    on = [bridge: name]
    for n <- 1..60, do: {:ok, ^n} = SessionStore.set_variable("demo", "n", n, on)
    :ok = Secrets.put("demo", "KEY", "0123456789", on)
    :ok = Exchange.export(Path.join(directory, "export.json"), on)
    :ok = until_snapshot(cfg.store)
    {cfg, pid}
  end

  defp until_snapshot(store) do
    if Path.wildcard(store <> "/snapshot.*") == [], do: until_snapshot(store), else: :ok
  end

  test "nothing is written where others may read, not for an instant", %{directory: directory} do
    test = self()
    name = :"Bridge.TestStore#{System.unique_integer([:positive])}"

    {worker, monitor} =
      spawn_monitor(fn ->
        receive do: (:go -> :ok)
        {cfg, pid} = everything(directory, name)
        GenServer.stop(pid)
        Config.delete(cfg)
      end)

    :erlang.trace_pattern({:file, :_, :_}, true, [])
    :erlang.trace(worker, true, [:call, :set_on_spawn, tracer: test])
    send(worker, :go)
    assert_receive {:DOWN, ^monitor, :process, ^worker, :normal}, 60_000
    delivered = :erlang.trace_delivered(:all)
    assert_receive {:trace_delivered, :all, ^delivered}
    :erlang.trace_pattern({:file, :_, :_}, false, [])

    calls = calls()
    made = for {pid, :open, [path, modes], at} <- calls, :exclusive in modes, do: {pid, to_string(path), at}
    names = for {_pid, path, _at} <- made, do: path |> Path.dirname() |> Path.basename()
    for kind <- ~w(log snapshot owner secrets.key export.json), do: assert(Enum.any?(names, &(&1 =~ ".#{kind}")), kind)

    for {pid, path, at} <- made do
      own = for {^pid, function, args, moment} <- calls, do: {moment, function, args}
      directory = Path.dirname(path)
      assert [{begun, _, _}] = Enum.filter(own, &match?({_, :make_dir, [^directory]}, &1))
      assert [{closed, _, _}] = Enum.filter(own, &match?({_, :change_mode, [^directory, 0o700]}, &1))
      assert [{own_mode, _, _}] = Enum.filter(own, &match?({_, :change_mode, [^path, 0o600]}, &1))
      assert [{placed, _, _}] = Enum.filter(own, &match?({_, f, [^path, _]} when f in [:rename, :make_link], &1))
      assert begun < closed and closed < at and at < own_mode and own_mode < placed
    end

    # And nothing is made in another way.
    assert [] = for({_, :open, [path, modes], _} <- calls, :write in modes, :exclusive not in modes, do: path)
    assert [] = for({_pid, function, [path | _], _at} <- calls, function in [:write_file, :copy], do: path)
  end

  defp calls(at \\ 0) do
    receive do
      {:trace, pid, :call, {:file, function, args}} -> [{pid, function, args, at} | calls(at + 1)]
      {:trace, _pid, _other, _call} -> calls(at)
    after
      0 -> []
    end
  end

  test "whatever the umask, only the owner may read what is there", %{directory: directory} do
    ebin = SessionStore |> :code.which() |> Path.dirname()

    script = """
    File.write!(#{inspect(directory <> "/open")}, "")
    cfg = %Bridge.Config{name: Writer, store: #{inspect(directory <> "/store")}}
    {:ok, _} = Bridge.SessionStore.start_link(cfg, compact_bytes: 2_000)
    Bridge.Config.put(cfg)
    for n <- 1..60, do: {:ok, ^n} = Bridge.SessionStore.set_variable("demo", "n", n, bridge: Writer)
    :ok = Bridge.Secrets.put("demo", "KEY", "0123456789", bridge: Writer)
    :ok = Bridge.Store.Exchange.export(#{inspect(directory <> "/export.json")}, bridge: Writer)
    IO.puts("there")
    IO.gets("")
    """

    sh = System.find_executable("sh")
    command = ~s(umask 000; exec elixir -pa "$1" -e "$2")

    port =
      Port.open({:spawn_executable, sh}, [:binary, :exit_status, line: 100, args: ["-c", command, "sh", ebin, script]])

    assert_receive {^port, {:data, {:eol, "there"}}}, 60_000
    :ok = until_snapshot(directory <> "/store")
    # It counts: what is made in the common way is open to all.
    assert mode(directory <> "/open") == 0o666
    assert {mode(directory <> "/store"), mode(directory <> "/export.json")} == {0o700, 0o600}
    # What a snapshot replaces may go meanwhile.
    there = for path <- Path.wildcard(directory <> "/store/*"), {:ok, stat} <- [File.stat(path)], do: {path, stat.mode}
    assert for({path, mode} <- there, Bitwise.band(mode, 0o777) != 0o600, do: path) == []
    names = for {path, _mode} <- there, do: Path.basename(path)
    kinds = ["log.", "owner", "secrets.key", "snapshot."]
    for kind <- kinds, do: assert(Enum.any?(names, &String.starts_with?(&1, kind)), kind)
    assert Enum.reject(names, &String.starts_with?(&1, kinds)) == []
    {:os_pid, pid} = Port.info(port, :os_pid)
    {_, 0} = System.cmd("kill", ["-9", "#{pid}"])
    assert_receive {^port, {:exit_status, _killed}}, 60_000
  end
end
