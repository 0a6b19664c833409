defmodule Bridge.Telemetry.Log do
  @moduledoc false
  # Which events are worth a line in the log, at which level, in which words. The caller of a command has its error in
  # hand, so that is `info`; what nobody asked for, a kernel's death say, is a warning.

  require Logger

  @order %{debug: 0, info: 1, warning: 2, error: 3, false: 4}

  @doc "Logs what is to be logged of an event, from `level` on."
  @spec event(atom(), [atom()], map(), map()) :: :ok
  def event(level, [:bridge, group | _] = name, measurements, metadata)
      when group in [:command, :execution, :kernel, :pool] and level != false do
    case line(name, measurements, metadata) do
      nil -> :ok
      {at, said} -> if @order[at] >= @order[level], do: Logger.log(at, said, about(metadata)), else: :ok
    end
  end

  def event(_level, _name, _measurements, _metadata), do: :ok

  defp about(metadata) do
    for {key, name} <- [bridge: :bridge, session: :session, kernel: :kernel, subject: :command, trace_id: :trace_id],
        value = metadata[key],
        do: {name, value}
  end

  @doc "The level and the line of an event; nil if it is not worth one."
  @spec line([atom()], map(), map()) :: {:debug | :info | :warning, String.t()} | nil
  # Somebody wanted it so.
  def line([:bridge, :command, :exception], _numbers, %{error: "bridge.Cancelled"}), do: nil

  def line([:bridge, :command, :exception], _numbers, said) do
    {:info, "#{said[:subject]} failed in session #{said[:session]}: #{said[:error]}"}
  end

  def line([:bridge, :execution, :retry], %{attempt: attempt}, said) do
    {:warning, "#{said[:subject]} is run again in session #{said[:session]}, attempt #{attempt}: its kernel died"}
  end

  def line([:bridge, :kernel, :stop], numbers, %{expected: false} = said) do
    code = if is_integer(said[:exit_code]), do: ", exit code #{said.exit_code}", else: ""
    {:warning, "kernel #{said[:kernel]} died#{code}, #{numbers[:lost]} commands lost: #{said[:reason]}"}
  end

  def line([:bridge, :kernel, :stop], _numbers, said), do: {:debug, "kernel #{said[:kernel]} ended: #{said[:reason]}"}

  def line([:bridge, :kernel, :start], _numbers, said),
    do: {:debug, "kernel #{said[:kernel]} is ready, process #{said[:pid]}"}

  def line([:bridge, :kernel, :unresponsive], _numbers, said) do
    {:warning, "kernel #{said[:kernel]} does not answer: #{said[:reason]}"}
  end

  def line([:bridge, :pool, :recycle], _numbers, said),
    do: {:info, "kernel #{said[:kernel]} is replaced: #{said[:reason]}"}

  def line([:bridge, :pool, :breaker, :open], numbers, said) do
    {:warning, "#{said[:subject]} is held back after #{numbers[:failures]} failures: #{said[:reason]}"}
  end

  def line([:bridge, :pool, :breaker, :close], _numbers, said),
    do: {:info, "#{said[:subject]} may run again: #{said[:reason]}"}

  def line([:bridge, :pool, :queue, :reject], numbers, said) do
    {:warning,
     "the queue is full (#{numbers[:waiting]} wait): #{said[:subject]} of session #{said[:session]} is refused"}
  end

  def line([:bridge, :pool, :sweep], %{killed: 0}, _said), do: nil

  def line([:bridge, :pool, :sweep], numbers, said) do
    {:warning, "#{numbers[:killed]} kernels that a dead host had left behind were killed: #{said[:reason]}"}
  end

  def line(_name, _numbers, _said), do: nil
end
