defmodule Bridge.Live.Cell do
  @moduledoc false
  # What is shown beneath one run of a cell: a line for each of its first commands, one for all the others together, and
  # one for each failure beyond. Bounded, whatever is done in the cell: 2 * 5 lines and a summary. A value; times in ns.

  alias Bridge.Live.{Line, Summary, Words}
  alias Bridge.Telemetry.Histogram

  @own 5
  @short_ns 150_000_000

  @enforce_keys [:began]
  defstruct [
    :began,
    own: [],
    told: %{},
    commands: 0,
    ok: 0,
    failed: 0,
    failures: 0,
    durations: %{},
    lm_calls: 0,
    tokens: 0
  ]

  @type id :: String.t()
  @type t :: %__MODULE__{}

  @spec new(integer()) :: t()
  def new(now), do: %__MODULE__{began: now}

  @doc "A command begins."
  @spec begin(t(), id(), String.t(), integer()) :: t()
  def begin(cell, id, subject, now) do
    line = %Line{subject: Words.in_one_line(subject), elapsed: 0, state: :queued}
    cell = %{cell | commands: cell.commands + 1, told: Map.put(cell.told, id, {now, line})}
    if cell.commands <= @own, do: %{cell | own: cell.own ++ [id]}, else: cell
  end

  @doc "Something is said of a command, running or over, that has a line."
  @spec say(t(), id(), keyword()) :: t()
  def say(cell, id, said) do
    case cell.told do
      %{^id => {began, line}} -> %{cell | told: Map.put(cell.told, id, {began, struct!(line, said)})}
      _ended -> cell
    end
  end

  @doc "It is with a kernel."
  @spec run(t(), id(), String.t(), non_neg_integer()) :: t()
  def run(cell, id, kernel, queue), do: say(cell, id, state: :running, kernel: kernel, queue: queue)

  @doc "Language models were called for it."
  @spec asked(t(), id(), non_neg_integer(), non_neg_integer()) :: t()
  def asked(cell, id, calls, tokens) do
    cell = %{cell | lm_calls: cell.lm_calls + calls, tokens: cell.tokens + tokens}

    case cell.told do
      %{^id => {_began, line}} -> say(cell, id, lm_calls: line.lm_calls + calls, tokens: line.tokens + tokens)
      _ended -> cell
    end
  end

  @doc "It has ended: well if there is no error. `attempts` is 0 if a cache had the result."
  @spec finish(t(), id(), non_neg_integer(), String.t() | nil, integer()) :: t()
  def finish(cell, id, attempts, error, now) do
    case cell.told do
      %{^id => {began, %{state: state} = line}} when state in [:queued, :running] ->
        elapsed = max(now - began, 0)

        ended = %{
          line
          | elapsed: elapsed,
            cached: error == nil and attempts == 0,
            attempt: max(attempts, 1),
            message: ""
        }

        ended = if error, do: %{ended | state: :error, error: error}, else: %{ended | state: :ok}
        durations = Map.update(cell.durations, Histogram.bucket(elapsed), 1, &(&1 + 1))
        cell = %{cell | durations: durations} |> counted(error) |> own_failure(id, error)
        # Of one without a line of its own nothing is kept.
        if id in cell.own,
          do: %{cell | told: Map.put(cell.told, id, {began, ended})},
          else: %{cell | told: Map.delete(cell.told, id)}

      _unknown ->
        cell
    end
  end

  defp counted(cell, nil), do: %{cell | ok: cell.ok + 1}
  defp counted(cell, _error), do: %{cell | failed: cell.failed + 1}

  defp own_failure(cell, _id, nil), do: cell

  defp own_failure(cell, id, _error) do
    if id in cell.own or cell.failures >= @own,
      do: cell,
      else: %{cell | own: cell.own ++ [id], failures: cell.failures + 1}
  end

  @doc "How many run."
  @spec running(t()) :: non_neg_integer()
  def running(cell), do: cell.commands - cell.ok - cell.failed

  @doc "Commands of which the end was not heard are counted as if they had never been."
  @spec lost(t()) :: t()
  def lost(cell) do
    gone = for {id, {_began, line}} <- cell.told, line.state in [:queued, :running], do: id
    %{cell | own: cell.own -- gone, told: Map.drop(cell.told, gone), commands: cell.ok + cell.failed}
  end

  @doc "The lines to be shown, oldest first: of what has only just begun nothing."
  @spec lines(t(), integer()) :: [Line.t() | Summary.t()]
  def lines(cell, now) do
    own =
      for id <- cell.own, {began, line} = cell.told[id], line.state in [:ok, :error] or now - began >= @short_ns do
        if line.state in [:ok, :error], do: line, else: %{line | elapsed: now - began}
      end

    if cell.commands > @own, do: own ++ [summary(cell, now)], else: own
  end

  defp summary(cell, now) do
    [p50, p95] = cell.durations |> Enum.sort() |> Histogram.percentiles([0.5, 0.95])

    %Summary{
      ok: cell.ok,
      failed: cell.failed,
      running: running(cell),
      p50: p50,
      p95: p95,
      lm_calls: cell.lm_calls,
      tokens: cell.tokens,
      elapsed: now - cell.began
    }
  end

  @doc "All of it as HTML; nil if there is nothing to show."
  @spec html(t(), integer()) :: String.t() | nil
  def html(cell, now) do
    case lines(cell, now) do
      [] -> nil
      lines -> Enum.map_join(lines, fn %module{} = line -> module.html(line) end)
    end
  end
end
