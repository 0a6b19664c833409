defmodule Bridge.Pool.OrphansTest do
  use ExUnit.Case, async: true

  import Bridge.TestProcesses

  alias Bridge.Pool.Orphans

  @nobody 4_194_305

  setup do
    parent = Path.join(System.tmp_dir!(), "orphans-#{System.pid()}-#{System.unique_integer([:positive])}")
    File.mkdir_p!(parent)
    on_exit(fn -> File.rm_rf!(parent) end)
    {:ok, parent: parent}
  end

  # A process that leads its group, as kernels do.
  defp sleeper do
    port = Port.open({:spawn_executable, System.find_executable("sleep")}, [:binary, :exit_status, args: ["600"]])
    {:os_pid, pid} = Port.info(port, :os_pid)
    on_exit(fn -> System.cmd("kill", ["-9", to_string(pid)], stderr_to_stdout: true) end)
    # Its pid is known before it has become a leader.
    eventually("it leads its group", fn -> group(pid) == pid end)
    {port, pid}
  end

  defp group(pid) do
    [_state, _parent, group | _more] =
      "/proc/#{pid}/stat" |> File.read!() |> String.split(")") |> List.last() |> String.split()

    String.to_integer(group)
  end

  # A runtime directory with the record of one kernel.
  defp recorded(parent, pid) do
    directory = Path.join(parent, "bridge-host#{System.unique_integer([:positive])}")
    kernel = Path.join(directory, "bridge-1")
    File.mkdir_p!(kernel)
    File.chmod!(directory, 0o700)
    :ok = Orphans.record(kernel, pid)
    directory
  end

  # The same with a host that is dead, or otherwise changed.
  defp changed(directory, change) do
    path = Path.join(directory, "owner.json")
    {:ok, record} = path |> File.read!() |> Bridge.JSON.decode()
    File.write!(path, record |> Map.merge(change) |> Bridge.JSON.encode!())
    directory
  end

  test "kernels whose host is gone are killed, stopped ones too, and its directory is removed", %{parent: parent} do
    {port, pid} = sleeper()
    directory = parent |> recorded(pid) |> changed(%{"pid" => @nobody})
    System.cmd("kill", ["-STOP", to_string(pid)])
    assert [%{directory: ^directory, host: @nobody, killed: [^pid]}] = Orphans.sweep(parent)
    assert_receive {^port, {:exit_status, 137}}, 60_000
    refute File.exists?(directory)
  end

  test "a host whose pid means another process by now is gone", %{parent: parent} do
    {port, pid} = sleeper()
    parent |> recorded(pid) |> changed(%{"started" => 1})
    assert [%{killed: [^pid]}] = Orphans.sweep(parent)
    assert_receive {^port, {:exit_status, 137}}, 60_000
  end

  test "a process that was given the pid of a kernel is left alone", %{parent: parent} do
    {_port, pid} = sleeper()
    parent |> recorded(pid) |> changed(%{"pid" => @nobody, "kernels" => %{to_string(pid) => 1}})
    assert [%{killed: []}] = Orphans.sweep(parent)
    assert Orphans.started(pid)
  end

  for {what, change} <- [
        {"a living host", quote(do: %{})},
        {"another machine", quote(do: %{"pid" => @nobody, "where" => "elsewhere pid:[1]"})},
        {"a record with nonsense in it", quote(do: %{"pid" => @nobody, "kernels" => %{"x" => 1}})},
        {"a record with other nonsense in it", quote(do: %{"pid" => @nobody, "kernels" => [1]})},
        {"a record of another make", quote(do: %{"pid" => "one"})}
      ] do
    test "the kernels of #{what} are left alone", %{parent: parent} do
      {_port, pid} = sleeper()
      directory = parent |> recorded(pid) |> changed(unquote(change))
      assert Orphans.sweep(parent) == []
      assert File.exists?(directory)
      assert Orphans.started(pid)
    end
  end

  test "a directory that others could have written to, a link and a directory without a record are left alone",
       context do
    %{parent: parent} = context
    {_port, pid} = sleeper()
    open = parent |> recorded(pid) |> changed(%{"pid" => @nobody})
    File.chmod!(open, 0o755)
    target = Path.join(parent, "elsewhere")
    parent |> recorded(pid) |> changed(%{"pid" => @nobody}) |> File.rename!(target)
    File.ln_s!(target, Path.join(parent, "bridge-link"))
    File.mkdir!(Path.join(parent, "bridge-empty"))
    File.chmod!(Path.join(parent, "bridge-empty"), 0o700)
    assert Orphans.sweep(parent) == []
    assert Orphans.started(pid)
  end

  test "what several processes write down at once is all there", %{parent: parent} do
    directory = Path.join(parent, "bridge-host")
    sleepers = for _ <- 1..8, do: sleeper() |> elem(1)
    for n <- 1..8, do: File.mkdir_p!(Path.join(directory, "bridge-#{n}"))

    sleepers
    |> Enum.with_index(1)
    |> Task.async_stream(fn {pid, n} -> Orphans.record(Path.join(directory, "bridge-#{n}"), pid) end, max_concurrency: 8)
    |> Enum.each(&assert(&1 == {:ok, :ok}))

    {:ok, record} = directory |> Path.join("owner.json") |> File.read!() |> Bridge.JSON.decode()
    assert record["kernels"] |> Map.keys() |> Enum.sort() == sleepers |> Enum.map(&to_string/1) |> Enum.sort()
    assert File.ls!(directory) |> Enum.reject(&String.starts_with?(&1, "bridge-")) == ["owner.json"]
  end

  test "the Python host reads the record as its own, and sweeps up after this one", %{parent: parent} do
    {port, pid} = sleeper()
    directory = parent |> recorded(pid) |> changed(%{"pid" => @nobody})

    script = """
    import sys
    from bridge_host.pool.orphans import sweep
    print([(swept.directory, swept.host, swept.killed) for swept in sweep(sys.argv[1])])
    """

    {said, 0} = System.cmd(Bridge.TestKernels.python(), ["-c", script, parent])
    assert said == "[('#{directory}', #{@nobody}, (#{pid},))]\n"
    assert_receive {^port, {:exit_status, 137}}, 60_000
  end

  test "and this one after the Python host", %{parent: parent} do
    {port, pid} = sleeper()
    directory = Path.join(parent, "bridge-python")
    File.mkdir!(directory)
    File.chmod!(directory, 0o700)

    script = """
    import sys
    from pathlib import Path
    from bridge_host.pool.orphans import Owner, here, started, write_owner
    pid = int(sys.argv[2])
    write_owner(Path(sys.argv[1]), Owner(here(), #{@nobody}, 1.0, {pid: started(pid)}))
    """

    {"", 0} = System.cmd(Bridge.TestKernels.python(), ["-c", script, directory, to_string(pid)])
    assert [%{killed: [^pid]}] = Orphans.sweep(parent)
    assert_receive {^port, {:exit_status, 137}}, 60_000
  end
end
