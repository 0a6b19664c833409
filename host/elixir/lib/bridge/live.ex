defmodule Bridge.Live do
  @moduledoc """
  Commands, shown in Livebook while they run and after; and a page that shows the whole bridge.

  Where Kino is loaded each command has one line beneath its cell, alive while it runs, settled when it has ended; beyond
  a cell's first five commands one line sums up all of them. `Bridge.Telemetry.live(false)` shows nothing. Without Kino
  there is nothing to see here, and `Bridge.Telemetry.summary/1` says the same in text.

  What a command is shown beneath is the cell whose group leader the process has that emits its `[:bridge, :command,
  :start]`.
  """

  use GenServer

  require Logger

  alias Bridge.Live.{Cell, Page}
  alias Bridge.Live.Kino, as: Seam
  alias Bridge.Telemetry

  @pause_ms 100
  @cells 64
  @remembered 2_000
  @max_pending 20_000
  @quiet_ns 1_000_000_000
  # Displays of this process that may be updated, by their ids.
  @frames :bridge_frames
  @max_frames 100

  # Who is told: the process, and how many events it has not looked at yet.
  @opaque t :: {pid(), :atomics.atomics_ref()}

  @doc """
  A page of the bridge that keeps itself up to date, twice a second: kernels, rates, percentiles, errors, models.

  In Livebook it is a frame; without Kino it is the summary as it is now.
  """
  @spec dashboard(atom()) :: term()
  def dashboard(bridge \\ Bridge) do
    if Seam.there?() do
      frame = Seam.frame()
      shown = :atomics.new(1, [])
      refresh(frame, bridge, shown)
      Seam.every(500, fn _tick -> refresh(frame, bridge, shown) end)
      frame
    else
      Telemetry.summary(bridge)
    end
  end

  # What is the same as before is not sent again: a page may be left open for days.
  defp refresh(frame, bridge, shown) do
    html = Page.html(Telemetry.summary(bridge))
    digest = :erlang.phash2(html, 4_294_967_296) + 1
    if :atomics.exchange(shown, 1, digest) != digest, do: Seam.show(frame, html), else: :ok
  end

  @doc """
  Shows what a kernel displayed beneath the cell whose group leader this is; an update in place of what this process has
  shown under its id. Without Kino it does nothing: whoever called has the `Bridge.Display` itself.
  """
  @spec display(Bridge.Display.t(), pid()) :: :ok
  def display(display, leader \\ Process.group_leader()) do
    if Seam.there?(), do: show_display(display, leader), else: :ok
  catch
    # Somebody else's code: what cannot be shown breaks no command.
    kind, reason ->
      said = Exception.format(kind, reason, Bridge.Private.without_arguments(__STACKTRACE__))
      Logger.warning("a display could not be shown: " <> said)
  end

  defp show_display(%{display_id: nil} = display, leader), do: Seam.render(leader, Bridge.Display.to_kino(display))

  defp show_display(%{display_id: id} = display, leader) do
    frames = Process.get(@frames, %{})

    cond do
      is_map_key(frames, id) ->
        Seam.put(frames[id], Bridge.Display.to_kino(display))

      display.update or map_size(frames) >= @max_frames ->
        Seam.render(leader, Bridge.Display.to_kino(display))

      true ->
        frame = Seam.frame(leader)
        Process.put(@frames, Map.put(frames, id, frame))
        Seam.put(frame, Bridge.Display.to_kino(display))
    end
  end

  # -- events, in the process that emits them --------------------------------------------------

  @doc false
  @spec wanted?() :: boolean()
  def wanted?, do: Application.get_env(:bridge_host, :live, true)

  @doc false
  # The process, linked to the caller; nil where there is no Kino to show anything by.
  @spec start(atom()) :: t() | nil
  def start(bridge) do
    if Seam.there?() do
      pending = :atomics.new(2, [])
      Bridge.Display.implement_render()
      {:ok, pid} = GenServer.start_link(__MODULE__, {bridge, pending})
      {pid, pending}
    end
  end

  @doc false
  @spec event(t(), [atom()], map(), map()) :: :ok
  def event(live, [:bridge, :command, :start], _numbers, said) do
    post(live, {:begin, Process.group_leader(), said, System.monotonic_time()})
  end

  def event(live, [:bridge, :command, last], numbers, said) when last in [:stop, :exception] do
    {attempts, error} = {numbers[:attempts] || 1, said[:error]}
    post(live, {:finish, said[:span_id], said[:command_id], attempts, error, System.monotonic_time()})
  end

  def event(live, [:bridge, :execution, :retry], numbers, said) do
    post(live, {:say, [said[:span_id], said[:parent_span_id]], attempt: numbers[:attempt], state: :queued})
  end

  def event(live, [:bridge, :pool, :route], numbers, said) do
    post(live, {:run, [said[:span_id], said[:parent_span_id]], said[:kernel], numbers[:queue]})
  end

  # What is sent beneath a tool, or beneath a span within one, is part of the command that called it.
  def event(live, [:bridge, what, :start], _numbers, %{span_id: span} = said) when what in [:tool, :span] do
    post(live, {:beneath, span, said[:command_id], said[:parent_span_id]})
  end

  def event(live, [:bridge, what, last], _numbers, %{span_id: span}) when what in [:tool, :span] and last != :start do
    post(live, {:above, span})
  end

  def event(_live, _name, _numbers, _said), do: :ok

  @doc false
  # What a kernel tells, and beneath which span all of the batch is: the command's.
  @spec told(t(), String.t() | nil, [atom()], map(), map()) :: :ok
  def told(live, root, [:bridge, :dspy, :lm, last], numbers, _said) when last in [:stop, :exception] do
    post(live, {:asked, root, number(numbers[:tokens])})
  end

  def told(live, root, [:bridge, :execution, :progress], numbers, said) do
    message = Bridge.Live.Words.in_one_line(said[:message] || "")
    post(live, {:progress, root, done: numbers[:done], total: numbers[:total], message: message})
  end

  def told(live, root, [:bridge, :execution, last], numbers, _said) when last in [:stop, :exception] do
    post(live, {:progress, root, callbacks: number(numbers[:callbacks])})
  end

  def told(_live, _root, _name, _numbers, _said), do: :ok

  defp number(n), do: if(is_number(n), do: trunc(n), else: 0)

  defp post({pid, pending}, event) do
    if :atomics.add_get(pending, 1, 1) <= @max_pending do
      send(pid, event)
      :ok
    else
      # A frame that does not render holds it up. Commands go on; what was not heard of is not shown.
      :atomics.sub(pending, 1, 1)
      :atomics.put(pending, 2, 1)
    end
  end

  # -- the process ---------------------------------------------------------------------------------

  @impl true
  def init({bridge, pending}) do
    state = %{
      bridge: bridge,
      pending: pending,
      # key => {cell, frame, html as it was shown last, when something happened last}
      cells: %{},
      # The oldest first.
      keys: [],
      # span => {key of its cell, span of the command that has the line}; ids of commands => spans.
      spans: %{},
      ids: %{},
      ended: :queue.new(),
      endings: 0,
      timer: nil
    }

    {:ok, state}
  end

  @impl true
  def handle_info(:tick, state) do
    # What was not heard of is forgotten once all that was heard has been looked at: what remains then has no end.
    behind? = :atomics.get(state.pending, 2) == 1
    state = if behind? and :atomics.get(state.pending, 1) == 0, do: forget_running(state), else: state
    now = System.monotonic_time()
    state = Enum.reduce(state.keys, %{state | timer: nil}, &show(&2, &1, now))
    alive? = behind? or Enum.any?(state.cells, fn {_key, at} -> Cell.running(at.cell) > 0 end)
    {:noreply, if(alive?, do: later(state), else: state)}
  end

  def handle_info({:DOWN, monitor, :process, _pid, _reason}, state) do
    # The cell is run anew, or deleted: what it showed is gone.
    gone = for {key, %{monitor: ^monitor}} <- state.cells, do: key
    {:noreply, Enum.reduce(gone, state, &forget(&2, &1))}
  end

  def handle_info(event, state) when is_tuple(event) do
    :atomics.sub(state.pending, 1, 1)
    {:noreply, event |> take(state) |> later()}
  end

  defp later(%{timer: nil} = state), do: %{state | timer: Process.send_after(self(), :tick, @pause_ms)}
  defp later(state), do: state

  defp take({:begin, leader, said, now}, state) do
    span = said[:span_id]

    case state.spans do
      %{^span => _known} -> state
      %{} when span == nil -> state
      spans -> begin(state, spans[said[:parent_span_id]], leader, span, said, now)
    end
  end

  defp take({:finish, span, command_id, attempts, error, now}, state) do
    state =
      with_span(state, span, fn
        cell, ^span -> Cell.finish(cell, span, attempts, error, ns(now))
        # One that a tool sent has no line.
        cell, _outer -> cell
      end)

    ended(%{state | ids: Map.delete(state.ids, command_id)}, span)
  end

  defp take({:say, spans, said}, state) do
    with_span(state, Enum.find(spans, &is_map_key(state.spans, &1)), fn cell, span -> Cell.say(cell, span, said) end)
  end

  defp take({:run, spans, kernel, queue}, state) do
    span = Enum.find(spans, &is_map_key(state.spans, &1))

    with_span(state, span, fn
      cell, ^span -> Cell.run(cell, span, kernel || "", System.convert_time_unit(queue || 0, :native, :nanosecond))
      cell, _outer -> cell
    end)
  end

  defp take({:asked, span, tokens}, state),
    do: with_span(state, span, fn cell, outer -> Cell.asked(cell, outer, 1, tokens) end)

  defp take({:progress, span, said}, state) do
    with_span(state, span, fn
      cell, ^span -> Cell.say(cell, span, said)
      cell, _outer -> cell
    end)
  end

  defp take({:beneath, span, command_id, parent}, state) do
    case state.spans[state.ids[command_id]] || state.spans[parent] do
      nil -> state
      above -> remember(state, span, above)
    end
  end

  defp take({:above, span}, state), do: ended(state, span)

  defp begin(state, {key, outer}, _leader, span, said, _now) do
    %{remember(state, span, {key, outer}) | ids: Map.put(state.ids, said[:command_id], span)}
  end

  defp begin(state, nil, leader, span, said, now) do
    now = ns(now)
    {key, state} = cell(state, {leader, Seam.cell(leader)}, now)
    state = remember(state, span, {key, span})
    at = Map.fetch!(state.cells, key)
    at = %{at | cell: Cell.begin(at.cell, span, said[:subject] || "", now), last: now}
    %{state | cells: Map.put(state.cells, key, at), ids: Map.put(state.ids, said[:command_id], span)}
  end

  defp cell(state, key, now) do
    case state.cells do
      %{^key => at} -> if over?(key, at, now), do: cell(forget(state, key), key, now), else: {key, state}
      _ -> {key, room(new_cell(state, key, now))}
    end
  end

  # Where Livebook does not say which cell it is, one that has been quiet for a while is taken to be over.
  defp over?({_leader, nil}, at, now), do: Cell.running(at.cell) == 0 and now - at.last > @quiet_ns
  defp over?(_key, _at, _now), do: false

  defp new_cell(state, key, now) do
    at = %{cell: Cell.new(now), frame: nil, monitor: nil, shown: nil, last: now}
    %{state | cells: Map.put(state.cells, key, at), keys: state.keys ++ [key]}
  end

  defp room(%{keys: [oldest | _]} = state) when map_size(state.cells) > @cells, do: forget(state, oldest)
  defp room(state), do: state

  defp forget(state, key) do
    {at, cells} = Map.pop(state.cells, key)
    if at && at.monitor, do: Process.demonitor(at.monitor, [:flush])
    spans = for {span, {of, _} = where} <- state.spans, of != key, into: %{}, do: {span, where}
    %{state | cells: cells, keys: List.delete(state.keys, key), spans: spans}
  end

  # Bounded by what runs, and by so many that have ended, of which something may still be told.
  defp remember(state, span, where), do: %{state | spans: Map.put(state.spans, span, where)}

  defp ended(state, span) when is_map_key(state.spans, span) do
    state = %{state | ended: :queue.in(span, state.ended), endings: state.endings + 1}

    if state.endings > @remembered do
      {{:value, oldest}, left} = :queue.out(state.ended)
      %{state | ended: left, endings: @remembered, spans: Map.delete(state.spans, oldest)}
    else
      state
    end
  end

  defp ended(state, _span), do: state

  defp with_span(state, span, fun) do
    with {key, outer} <- state.spans[span], %{^key => at} <- state.cells do
      changed = %{at | cell: fun.(at.cell, outer), last: ns(System.monotonic_time())}
      %{state | cells: Map.put(state.cells, key, changed)}
    else
      _not_shown -> state
    end
  end

  defp forget_running(state) do
    :atomics.put(state.pending, 2, 0)

    %{
      state
      | cells: Map.new(state.cells, fn {key, at} -> {key, %{at | cell: Cell.lost(at.cell)}} end),
        spans: %{},
        ids: %{},
        ended: :queue.new(),
        endings: 0
    }
  end

  defp show(state, {leader, _file} = key, now) do
    at = Map.fetch!(state.cells, key)

    case Cell.html(at.cell, ns(now)) do
      html when html == nil or html == at.shown ->
        state

      html ->
        at = if at.frame == nil, do: framed(at, leader), else: at
        Seam.show(at.frame, html)
        %{state | cells: Map.put(state.cells, key, %{at | shown: html})}
    end
  end

  defp framed(at, leader) do
    frame = Seam.frame(leader)
    process = Seam.process(frame)
    %{at | frame: frame, monitor: process && Process.monitor(process)}
  end

  defp ns(native), do: System.convert_time_unit(native, :native, :nanosecond)
end
