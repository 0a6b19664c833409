defmodule Bridge.TestProcesses do
  @moduledoc "Processes of the operating system, as tests look at them and hurt them, and bridges whose kernels they find."

  @mark "BRIDGE_TEST_MARK"

  @doc """
  Starts a bridge of its own under the test's supervisor: its name, what its kernels are marked with, and its directory.
  `start: false` only makes the options, for `{Bridge, opts}`.
  """
  @spec bridge(keyword()) :: %{name: atom(), mark: String.t(), opts: keyword()}
  def bridge(opts \\ []) do
    {start, opts} = Keyword.pop(opts, :start, true)
    number = System.unique_integer([:positive])
    mark = "#{System.pid()}-#{number}"

    opts =
      opts
      |> Keyword.put_new(:name, :"Bridge.TestBridge#{number}")
      |> Keyword.put_new(:python, Bridge.TestKernels.python())
      |> Keyword.update(:env, %{@mark => mark}, &Map.put(&1, @mark, mark))

    ExUnit.Callbacks.on_exit(fn -> Enum.each(marked(mark), &signal(&1, "KILL")) end)
    if start, do: ExUnit.Callbacks.start_supervised!({Bridge, opts})
    %{name: opts[:name], mark: mark, opts: opts}
  end

  @doc "The kernels, as soon as `count` are ready."
  @spec ready(atom(), pos_integer()) :: [map()]
  def ready(bridge, count) do
    eventually("#{count} kernels are ready", fn ->
      found = for %{state: :ready} = kernel <- Bridge.kernels!(bridge: bridge), do: kernel
      if length(found) == count, do: found
    end)
  end

  @doc "The live processes that were started with that mark."
  @spec marked(String.t()) :: [pos_integer()]
  def marked(mark) do
    for name <- File.ls!("/proc"),
        {pid, ""} <- [Integer.parse(name)],
        {:ok, environment} <- [File.read("/proc/#{pid}/environ")],
        String.contains?(environment, "#{@mark}=#{mark}\0"),
        alive?(pid),
        do: pid
  end

  @spec alive?(pos_integer()) :: boolean()
  def alive?(pid) do
    case File.read("/proc/#{pid}/stat") do
      {:ok, line} -> (line |> String.split(")") |> List.last() |> String.split() |> hd()) not in ["Z", "X"]
      {:error, _gone} -> false
    end
  end

  @doc "Resident memory in bytes; nil if the process is gone."
  @spec rss(pos_integer()) :: non_neg_integer() | nil
  def rss(pid) do
    with {:ok, status} <- File.read("/proc/#{pid}/status"),
         [_, kilobytes] <- Regex.run(~r/VmRSS:\s+(\d+) kB/, status) do
      String.to_integer(kilobytes) * 1_024
    else
      _gone -> nil
    end
  end

  @doc "Sends a signal; nothing if there is no such process."
  @spec signal(pos_integer(), String.t()) :: :ok
  def signal(pid, name) do
    System.cmd("kill", ["-#{name}", to_string(pid)], stderr_to_stdout: true)
    :ok
  end

  @doc "What the function says as soon as it is neither nil nor false; it is asked again and again for a minute."
  @spec eventually(String.t() | (() -> String.t()), (() -> value)) :: value when value: term()
  def eventually(what, fun), do: eventually(what, fun, System.monotonic_time(:millisecond) + 60_000)

  defp eventually(what, fun, until) do
    cond do
      value = fun.() ->
        value

      System.monotonic_time(:millisecond) > until ->
        ExUnit.Assertions.flunk("never: " <> if(is_function(what), do: what.(), else: what))

      true ->
        Process.sleep(10)
        eventually(what, fun, until)
    end
  end
end
