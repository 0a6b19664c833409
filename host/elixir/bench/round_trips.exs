# Times round trips from Elixir, for bench/elixir.py: JSON that says what there is to call, then a line
# "command-echo 100" in, and the nanoseconds of each of the hundred out. A line "read 8 10000" is ten thousand reads of
# a variable by each of eight processes, and "ets 8 10000" of a bare ETS table: the nanoseconds that all of them took.
defmodule Bench.RoundTrips do
  @echo """
  import json, sys
  for line in sys.stdin:
      print(json.dumps(json.loads(line)), flush=True)
  """

  def main do
    {:ok, setting} = Bridge.JSON.decode(IO.gets(""))
    {:ok, _} = Bridge.start_link(python: setting["python"])
    session = Bridge.session("bench")
    payload = setting["payload"]
    {:ok, _} = Bridge.SessionStore.set_variable(session, "x", payload)
    :ok = Bridge.define(session, "echo", "def echo(value):\n    return value\n")
    for {name, source} <- setting["functions"], do: :ok = Bridge.define(session, name, source)
    :ok = Bridge.Tools.register(session, "tool", fn %{"value" => value} -> value end)
    table = :ets.new(:variables, [:set, :public, read_concurrency: true])
    :ets.insert(table, {{"bench", "x"}, payload})
    state = %{session: session, payload: payload, port: echo(setting["python"]), table: table}
    {:ok, 1} = Bridge.call(session, "operator.index", [1])
    [%{os_pid: pid}] = Bridge.kernels!()
    IO.puts("up #{pid}")
    serve(state)
  end

  # What one would write without Bridge: a line of JSON to Python, and one back.
  defp echo(python) do
    Port.open({:spawn_executable, python}, [:binary, line: 65_536, args: ["-c", @echo]])
  end

  defp serve(state) do
    case IO.gets("") do
      :eof ->
        Bridge.stop()

      line ->
        line |> String.split() |> run(state) |> Bridge.JSON.encode!() |> IO.puts()
        serve(state)
    end
  end

  defp run(["callback-" <> function, count], state) do
    {:ok, durations} = Bridge.call(state.session, function, [state.payload, String.to_integer(count)])
    durations
  end

  # Commands a second, so many at once.
  defp run(["throughput", at_once, count], state) do
    [at_once, count] = Enum.map([at_once, count], &String.to_integer/1)

    timed(at_once, fn ->
      repeat(div(count, at_once), fn -> {:ok, _} = Bridge.call(state.session, "echo", [state.payload]) end)
    end)
  end

  defp run([what, readers, count], state) do
    [readers, count] = Enum.map([readers, count], &String.to_integer/1)

    read =
      case what do
        "read" -> fn -> {:ok, _} = Bridge.SessionStore.get_variable(state.session, "x") end
        "ets" -> fn -> [_] = :ets.lookup(state.table, {"bench", "x"}) end
      end

    timed(readers, fn -> repeat(count, read) end)
  end

  defp run([what, count], state) do
    trip =
      case what do
        "command-index" -> fn -> {:ok, 1} = Bridge.call(state.session, "operator.index", [1]) end
        "command-echo" -> fn -> {:ok, _} = Bridge.call(state.session, "echo", [state.payload]) end
        "port-echo" -> fn -> port_echo(state) end
      end

    for _ <- 1..String.to_integer(count) do
      began = now()
      trip.()
      now() - began
    end
  end

  defp port_echo(%{port: port} = state) do
    Port.command(port, [Bridge.JSON.encode!(state.payload), ?\n])
    receive do: ({^port, {:data, {:eol, line}}} -> {:ok, _} = Bridge.JSON.decode(line))
  end

  # All of them begin when all are there.
  defp timed(processes, fun) do
    tasks = for _ <- 1..processes, do: Task.async(fn -> receive(do: (:begin -> fun.())) end)
    began = now()
    Enum.each(tasks, &send(&1.pid, :begin))
    Task.await_many(tasks, :infinity)
    [now() - began]
  end

  defp repeat(0, _fun), do: :ok

  defp repeat(left, fun) do
    fun.()
    repeat(left - 1, fun)
  end

  defp now, do: System.monotonic_time(:nanosecond)
end

# What the host has to say would be among the answers.
Logger.configure(level: :none)
Bench.RoundTrips.main()
