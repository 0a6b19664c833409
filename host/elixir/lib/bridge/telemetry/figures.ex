defmodule Bridge.Telemetry.Figures do
  @moduledoc false
  # What is counted of commands, errors, kernels and models: exact counts in bounded memory, added to by whoever emits.
  # Each row has its numbers in `:atomics`, so that an event costs a look into ETS and a few additions, and nobody waits.

  alias Bridge.Telemetry.Histogram

  @max_commands 1_000
  @max_errors 2_000
  @max_kernels 500
  @max_models 200
  @others "(others)"
  @most_bytes 0xFFFF_FFFF_FFFF

  # Places in the atomics of a command, a kernel, a model.
  @command %{errors: 1, retries: 2, cached: 3}
  @kernel %{commands: 1, errors: 2, unresponsive: 3, lost: 4, rss: 5, peak: 6, ready: 7, deaths: 8}
  @model %{calls: 1, errors: 2, cache_hits: 3, input_tokens: 4, output_tokens: 5, tokens: 6, nano_usd: 7}

  # The last minute: sixty seconds of counts, and six histograms of ten seconds each.
  @seconds 60
  @slots 6
  @slot_s 10

  @enforce_keys [:table, :rows, :series, :slots, :began]
  defstruct [:table, :rows, :series, :slots, :began]

  @type t :: %__MODULE__{}

  @spec new() :: t()
  def new do
    table = :ets.new(__MODULE__, [:set, :public, read_concurrency: true, write_concurrency: true])
    slots = for _ <- 1..@slots, do: {:atomics.new(1, []), Histogram.new()}

    %__MODULE__{
      table: table,
      rows: :atomics.new(4, []),
      series: :atomics.new(3 * @seconds, []),
      slots: List.to_tuple(slots),
      began: System.monotonic_time(:second)
    }
  end

  # -- counting --------------------------------------------------------------------------

  @doc "Counts one event. One that lacks what the catalogue says it has is not counted."
  @spec count(t(), [atom()], map(), map()) :: :ok
  def count(f, [:bridge, :command, last], %{duration: duration, attempts: attempts}, %{subject: subject} = said)
      when last in [:stop, :exception] and is_integer(duration) and is_integer(attempts) and is_binary(subject) do
    ns = ns(duration)
    {numbers, durations, _queue, _kernel} = command(f, subject)
    bucket = Histogram.add(durations, ns)
    failed? = last == :exception
    if attempts == 0, do: :atomics.add(numbers, @command.cached, 1)
    if attempts > 1, do: :atomics.add(numbers, @command.retries, attempts - 1)

    if failed? do
      :atomics.add(numbers, @command.errors, 1)
      failed(f, :command, said[:error], subject)
    end

    recent(f, bucket, failed?)
  end

  def count(f, [:bridge, :pool, :route], %{queue: queue}, %{subject: subject})
      when is_integer(queue) and is_binary(subject) do
    {_numbers, _durations, queued, _kernel} = command(f, subject)
    Histogram.add(queued, ns(queue))
    :ok
  end

  def count(f, [:bridge, :execution, last], %{duration: duration}, %{subject: subject, kernel: kernel})
      when last in [:stop, :exception] and is_integer(duration) and is_binary(subject) and is_binary(kernel) do
    {_numbers, _durations, _queue, in_kernel} = command(f, subject)
    Histogram.add(in_kernel, ns(duration))

    if kernel != "" do
      numbers = kernel(f, kernel)
      :atomics.add(numbers, @kernel.commands, 1)
      if last == :exception, do: :atomics.add(numbers, @kernel.errors, 1)
    end

    :ok
  end

  def count(f, [:bridge, :tool, :exception], _numbers, %{tool: tool, error: error}) when is_binary(tool) do
    failed(f, :tool, error, tool)
  end

  def count(f, [:bridge, :kernel, :start], %{duration: ready, system_time: at}, %{kernel: id} = said)
      when is_binary(id) and is_integer(ready) and is_integer(at) do
    numbers = kernel(f, id)
    :atomics.put(numbers, @kernel.ready, ns(ready))
    if is_integer(said[:deaths]), do: :atomics.put(numbers, @kernel.deaths, said.deaths)
    about(f, id, %{pid: said[:pid], started: at, spare: said[:spare] == true})
  end

  def count(f, [:bridge, :kernel, :stop], %{system_time: at, lost: lost} = numbers, %{kernel: id} = said)
      when is_binary(id) and is_integer(at) and is_integer(lost) do
    :atomics.add(kernel(f, id), @kernel.lost, lost)
    began = if is_integer(numbers[:duration]), do: at - numbers.duration, else: at

    about(f, id, %{
      pid: said[:pid],
      ended: at,
      expected: said[:expected] == true,
      exit_code: said[:exit_code],
      reason: text(said[:reason] || ""),
      started: {:unless_known, began}
    })
  end

  def count(f, [:bridge, :kernel, :memory], %{rss: rss}, %{kernel: id}) when is_binary(id) and is_integer(rss) do
    numbers = kernel(f, id)
    # The kernel says it, which may be anybody's: 64 bits have to hold it.
    rss = rss |> max(0) |> min(@most_bytes)
    :atomics.put(numbers, @kernel.rss, rss)
    if rss > :atomics.get(numbers, @kernel.peak), do: :atomics.put(numbers, @kernel.peak, rss)
    :ok
  end

  def count(f, [:bridge, :kernel, :unresponsive], _numbers, %{kernel: id}) when is_binary(id) do
    :atomics.add(kernel(f, id), @kernel.unresponsive, 1)
  end

  def count(f, [:bridge, :pool, :recycle], _numbers, %{kernel: id, reason: reason}) when is_binary(id) do
    about(f, id, %{recycled: text(reason)})
  end

  def count(f, [:bridge, :dspy, :lm, last], %{duration: duration} = measured, %{model: model} = said)
      when last in [:stop, :exception] and is_integer(duration) and is_binary(model) do
    {numbers, durations, first} = model(f, model)
    {given, made} = {tokens(measured, :input_tokens), tokens(measured, :output_tokens)}
    :atomics.add(numbers, @model.calls, 1)
    :atomics.add(numbers, @model.input_tokens, given)
    :atomics.add(numbers, @model.output_tokens, made)
    :atomics.add(numbers, @model.tokens, if(measured[:tokens], do: tokens(measured, :tokens), else: given + made))
    cost = measured[:cost]
    # Within what 64 bits hold: a kernel, which may be anybody's, said it.
    if is_number(cost) and cost > 0 and cost < 1.0e6, do: :atomics.add(numbers, @model.nano_usd, round(cost * 1.0e9))
    if last == :exception, do: :atomics.add(numbers, @model.errors, 1)

    # What DSPy's cache answered says nothing of the model's speed.
    if said[:cache_hit] == true,
      do: :atomics.add(numbers, @model.cache_hits, 1),
      else: Histogram.add(durations, ns(duration))

    if is_integer(measured[:first_token]), do: Histogram.add(first, ns(measured.first_token))
    :ok
  end

  def count(_f, _name, _measurements, _metadata), do: :ok

  defp tokens(measured, which) do
    case measured do
      %{^which => n} when is_number(n) and n >= 0 and n < 1_000_000_000_000 -> trunc(n)
      _ -> 0
    end
  end

  # More than a century is nobody's duration, and would overflow the sums.
  defp ns(native),
    do: native |> System.convert_time_unit(:native, :nanosecond) |> max(0) |> min(4_000_000_000_000_000_000)

  defp command(f, subject) do
    case :ets.lookup(f.table, {:command, subject}) do
      [{_key, numbers, durations, queue, kernel}] ->
        {numbers, durations, queue, kernel}

      [] ->
        name = room(f, 1, @max_commands, subject)
        new = {{:command, name}, :atomics.new(3, []), Histogram.new(), Histogram.new(), Histogram.new()}
        insert(f, 1, new)
        [{_key, numbers, durations, queue, kernel}] = :ets.lookup(f.table, {:command, name})
        {numbers, durations, queue, kernel}
    end
  end

  defp model(f, model) do
    case :ets.lookup(f.table, {:model, model}) do
      [{_key, numbers, durations, first}] ->
        {numbers, durations, first}

      [] ->
        name = room(f, 2, @max_models, model)
        insert(f, 2, {{:model, name}, :atomics.new(7, []), Histogram.new(), Histogram.new()})
        [{_key, numbers, durations, first}] = :ets.lookup(f.table, {:model, name})
        {numbers, durations, first}
    end
  end

  defp kernel(f, id) do
    case :ets.lookup(f.table, {:kernel, id}) do
      [{_key, numbers, _about}] ->
        numbers

      [] ->
        if :atomics.get(f.rows, 3) >= @max_kernels, do: forget_kernel(f)
        insert(f, 3, {{:kernel, copy(id)}, :atomics.new(8, []), %{}})

        case :ets.lookup(f.table, {:kernel, id}) do
          [{_key, numbers, _about}] -> numbers
          # Another process had to make room in the same moment.
          [] -> :atomics.new(8, [])
        end
    end
  end

  # Kernels come and go: the first of those that have ended makes room, else the first of all.
  defp forget_kernel(f) do
    rows = :ets.match_object(f.table, {{:kernel, :_}, :_, :_})
    oldest = fn {_key, _numbers, about} -> {not is_map_key(about, :ended), about[:started] || 0} end

    case Enum.sort_by(rows, oldest) do
      [{key, _, _} | _] -> if :ets.take(f.table, key) != [], do: :atomics.sub(f.rows, 3, 1), else: :ok
      [] -> :ok
    end
  end

  defp about(f, id, said) do
    _row = kernel(f, id)

    case :ets.lookup(f.table, {:kernel, id}) do
      [{key, _numbers, known}] ->
        {default, said} = Map.pop(said, :started)
        started = with {:unless_known, began} <- default, do: known[:started] || began
        said = if started, do: Map.put(said, :started, started), else: said
        :ets.update_element(f.table, key, {3, Map.merge(known, said)})
        :ok

      [] ->
        :ok
    end
  end

  defp failed(f, of, error, about) do
    error = text(error)
    at = System.system_time()
    key = {:error, of, error, about}

    if :ets.member(f.table, key) do
      bump(f, key, at)
    else
      if :atomics.get(f.rows, 4) < @max_errors do
        insert(f, 4, {{:error, of, copy(error), copy(about)}, 0, at})
        bump(f, key, at)
      else
        insert(f, 4, {{:error, of, @others, @others}, 0, at})
        bump(f, {:error, of, @others, @others}, at)
      end
    end
  end

  # What the figures' own rows hold is shown: a text, whoever said it.
  defp text(text) when is_binary(text), do: text
  defp text(other), do: inspect(other, limit: 5, printable_limit: 200)

  defp bump(f, key, at) do
    :ets.update_counter(f.table, key, {2, 1})
    :ets.update_element(f.table, key, {3, at})
    :ok
  end

  defp room(f, which, most, name), do: if(:atomics.get(f.rows, which) < most, do: copy(name), else: @others)

  defp insert(f, which, row), do: if(:ets.insert_new(f.table, row), do: :atomics.add(f.rows, which, 1), else: :ok)

  defp copy(text), do: :binary.copy(text)

  # -- the last minute -----------------------------------------------------------------------

  # When a slot is taken over for a new time, what others add in that very moment may be lost: of this, and of nothing
  # else. A lock would make all of them wait.
  defp recent(f, bucket, failed?) do
    now = System.monotonic_time(:second) - f.began
    at = 3 * rem(now, @seconds)
    mark = now + 1

    case :atomics.get(f.series, at + 1) do
      ^mark ->
        :ok

      old ->
        if :atomics.compare_exchange(f.series, at + 1, old, mark) == :ok do
          :atomics.put(f.series, at + 2, 0)
          :atomics.put(f.series, at + 3, 0)
        end
    end

    :atomics.add(f.series, at + 2, 1)
    if failed?, do: :atomics.add(f.series, at + 3, 1)

    age = div(now, @slot_s) + 1
    {mark, histogram} = elem(f.slots, rem(age, @slots))

    case :atomics.get(mark, 1) do
      ^age -> :ok
      old -> if :atomics.compare_exchange(mark, 1, old, age) == :ok, do: Histogram.reset(histogram)
    end

    Histogram.add_to(histogram, bucket)
  end

  @doc "The last minute: rates, percentiles of the last 50 to 60 s, and series of seconds, oldest first."
  @spec recent(t()) :: map()
  def recent(f) do
    now = System.monotonic_time(:second) - f.began
    first = now - @seconds + 1

    series =
      for second <- first..now do
        at = 3 * Integer.mod(second, @seconds)

        if :atomics.get(f.series, at + 1) == second + 1,
          do: {:atomics.get(f.series, at + 2), :atomics.get(f.series, at + 3)},
          else: {0, 0}
      end

    age = div(now, @slot_s) + 1

    counts =
      for {mark, histogram} <- Tuple.to_list(f.slots), :atomics.get(mark, 1) in (age - @slots + 1)..age do
        Histogram.counts(histogram)
      end

    together = counts |> Enum.concat() |> Enum.reduce(%{}, fn {b, n}, sum -> Map.update(sum, b, n, &(&1 + n)) end)
    [p50, p95, p99] = together |> Enum.sort() |> Histogram.percentiles([0.5, 0.95, 0.99])
    {commands, errors} = Enum.unzip(series)
    elapsed = max(min(now, @seconds), 1)

    %{
      commands_per_s: Enum.sum(commands) / elapsed,
      errors_per_s: Enum.sum(errors) / elapsed,
      p50: p50,
      p95: p95,
      p99: p99,
      commands: commands,
      errors: errors
    }
  end

  # -- what is known ---------------------------------------------------------------------------

  @doc "How long commands take, those first that took most; durations in nanoseconds."
  @spec latencies(t()) :: [map()]
  def latencies(f) do
    rows =
      for {{:command, name}, numbers, durations, queue, kernel} <-
            :ets.match_object(f.table, {{:command, :_}, :_, :_, :_, :_}),
          took = Histogram.figures(durations, [0.5, 0.95, 0.99]),
          took.count > 0 do
        [p50, p95, p99] = took.percentiles
        [queue_p50, queue_p95] = Histogram.figures(queue, [0.5, 0.95]).percentiles
        [kernel_p50, kernel_p95] = Histogram.figures(kernel, [0.5, 0.95]).percentiles

        Map.merge(read(numbers, @command), %{
          command: name,
          count: took.count,
          total: took.total,
          low: took.low,
          high: took.high,
          p50: p50,
          p95: p95,
          p99: p99,
          queue_p50: queue_p50,
          queue_p95: queue_p95,
          kernel_p50: kernel_p50,
          kernel_p95: kernel_p95
        })
      end

    Enum.sort_by(rows, &{&1.command == @others, -&1.total})
  end

  @doc "Errors by type: how often, of which commands or tools, when last (native system time)."
  @spec errors(t()) :: [map()]
  def errors(f) do
    f.table
    |> :ets.match_object({{:error, :_, :_, :_}, :_, :_})
    |> Enum.group_by(fn {{:error, of, error, _about}, _n, _at} -> {of, error} end)
    |> Enum.map(fn {{of, error}, rows} ->
      about = rows |> Enum.map(fn {{_, _, _, about}, n, _at} -> {about, n} end) |> Enum.sort_by(&(-elem(&1, 1)))
      count = about |> Enum.map(&elem(&1, 1)) |> Enum.sum()
      last = rows |> Enum.map(&elem(&1, 2)) |> Enum.max()
      %{error: error, of: of, count: count, last: last, about: Enum.take(about, 20)}
    end)
    |> Enum.sort_by(&{&1.error == @others, -&1.count})
  end

  @doc "Kernels, in the order in which they were started; times in native system time, memory in bytes."
  @spec kernels(t()) :: [map()]
  def kernels(f) do
    rows =
      for {{:kernel, id}, numbers, about} <- :ets.match_object(f.table, {{:kernel, :_}, :_, :_}) do
        known = %{
          pid: nil,
          started: nil,
          ended: nil,
          expected: nil,
          exit_code: nil,
          reason: "",
          recycled: "",
          spare: false
        }

        row = known |> Map.merge(read(numbers, @kernel)) |> Map.merge(about) |> Map.put(:kernel, id)
        Map.put(row, :state, state(row))
      end

    Enum.sort_by(rows, &(&1.started || 0))
  end

  defp state(%{ended: nil}), do: :alive
  defp state(%{expected: true}), do: :ended
  defp state(_row), do: :died

  @doc "Language models: calls, tokens, cost in USD, latency in nanoseconds of calls that no cache answered."
  @spec models(t()) :: [map()]
  def models(f) do
    rows =
      for {{:model, name}, numbers, durations, first} <- :ets.match_object(f.table, {{:model, :_}, :_, :_, :_}) do
        {nano, row} = Map.pop(read(numbers, @model), :nano_usd)
        [p50, p95] = Histogram.figures(durations, [0.5, 0.95]).percentiles
        [first_p50] = Histogram.figures(first, [0.5]).percentiles
        Map.merge(row, %{model: name, cost: nano / 1.0e9, p50: p50, p95: p95, first_token_p50: first_p50})
      end

    Enum.sort_by(rows, &{&1.model == @others, -&1.tokens})
  end

  defp read(numbers, places), do: Map.new(places, fn {name, place} -> {name, :atomics.get(numbers, place)} end)
end
