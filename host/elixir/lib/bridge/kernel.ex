defmodule Bridge.Kernel do
  @moduledoc false
  # One place for a kernel: starts a Python process, speaks with it, and starts another when it has died.
  #
  # Commands (`Bridge.Command`) ask it to send for them, and are sent `{:bridge_kernel, ref, event}`:
  #
  # - `{:answer, {:ok, result, buffers} | {:error, error}}`, the last; `{:died, error}` if there will be none, `{:gone,
  #   error}` if the kernel had died before it could be sent
  # - `{:callback, id, method, params, buffers}`, to be answered with `answer/3`
  # - `{:notification, method, params, buffers}`, `{:output, name, text}`, `{:display, content, update?}`
  #
  # It is the one process that has the sockets; who dies while a command of theirs runs has it cancelled.

  use GenServer, restart: :transient, shutdown: 10_000

  alias Bridge.{Config, Error, Pool, Secrets, Telemetry}
  alias Bridge.Kernel.Launch
  alias Bridge.Wire.{Conn, Peer}

  require Logger

  @telemetry "application/vnd.bridge.telemetry.v1+json"
  @handshake_ms 30_000
  @patience_ms 30_000
  @farewell_ms 1_500
  @first_pause_ms 100
  @longest_pause_ms 30_000
  @beats 4
  @hopeless_after 3
  @exit_ms 250
  @longest_id 128
  # No kernel's policy allows less, and what a host asks for itself must fit.
  @least_message_bytes 65_536

  defstruct [
    :cfg,
    :number,
    :launched,
    :conn,
    :shell,
    :control,
    :iopub,
    :id,
    :born,
    :heard,
    :beat,
    :due,
    status: :down,
    owners: %{},
    ids: %{},
    sources: MapSet.new(),
    deaths: 0,
    failures: 0,
    pinged: nil
  ]

  @spec start_link({Config.t(), integer()}) :: GenServer.on_start()
  def start_link({cfg, number}), do: GenServer.start_link(__MODULE__, {cfg, number})

  # -- for commands -------------------------------------------------------------------

  @doc """
  Sends a command. `params` are encoded, a list in which `{:source, hash, json}` stands for a function's source, which is
  left out (null) where the kernel has it.
  """
  @spec request(pid(), reference(), String.t(), list(), [binary()]) :: :ok
  def request(kernel, ref, method, params, buffers) do
    # In a function: what waits in a mailbox is in a crash report.
    GenServer.cast(kernel, {:request, self(), ref, method, fn -> {params, buffers} end})
  end

  @doc "Answers a callback."
  @spec answer(pid(), term(), {:ok, iodata(), [binary()]} | {:error, Error.t()}) :: :ok
  def answer(kernel, callback, reply), do: GenServer.cast(kernel, {:reply, callback, reply})

  @doc "Stops a command; nothing more is heard of it."
  @spec cancel(pid(), reference()) :: :ok
  def cancel(kernel, ref), do: GenServer.cast(kernel, {:cancel, ref})

  @spec credit(pid(), reference(), pos_integer()) :: :ok
  def credit(kernel, ref, credit), do: GenServer.cast(kernel, {:credit, ref, credit})

  @doc "The kernel forgets the source: it is sent with the next command."
  @spec forget_source(pid(), String.t()) :: :ok
  def forget_source(kernel, hash), do: GenServer.cast(kernel, {:forget_source, hash})

  @doc "Finishes what runs there, then goes for good."
  @spec retire(pid()) :: :ok
  def retire(kernel), do: GenServer.cast(kernel, :retire)

  # -- the process ----------------------------------------------------------------------

  @impl true
  def init({cfg, number}) do
    Process.flag(:trap_exit, true)
    {:ok, %__MODULE__{cfg: cfg, number: number}, {:continue, :start}}
  end

  @impl true
  def handle_continue(:start, state), do: {:noreply, start(state)}

  defp start(%{cfg: cfg} = state) do
    began = System.monotonic_time()

    case launch(cfg, state.number) do
      {:ok, launched} ->
        with :ok <- Launch.await(launched, cfg.start_timeout),
             {:ok, state} <- connect(%{state | launched: launched}) do
          ready(state, began)
        else
          {:error, error} ->
            Launch.close(launched)
            failed(%{state | launched: nil}, error)

          {:error, state, error} ->
            Launch.close(launched)
            failed(%{disconnect(state) | launched: nil, conn: nil}, error)
        end

      {:error, error} ->
        failed(state, error)
    end
  end

  defp launch(cfg, number), do: Launch.start(cfg, number)

  # Commands wait for a kernel that may yet come. After some failures in a row they are told why none does.
  defp failed(state, error) do
    state = %{state | failures: state.failures + 1}
    if state.failures >= @hopeless_after, do: Pool.hopeless(state.cfg, error)
    again_later(state)
  end

  defp again_later(state) do
    pause = min(@first_pause_ms * 2 ** min(state.failures, 10), @longest_pause_ms)
    if state.failures > 0, do: Process.send_after(self(), :start, pause), else: send(self(), :start)
    %{state | status: :down}
  end

  # An error comes with the state, whose sockets are to be closed.
  defp connect(%{cfg: cfg, launched: launched} = state) do
    conn = Conn.new(launched.connection.key, max_message_bytes: cfg.max_message_bytes)

    with {:ok, state} <- connect_to(%{state | conn: conn}, :iopub, :sub),
         :ok <- Peer.subscribe(state.iopub, Conn.topic(conn)),
         {:ok, state} <- connect_to(state, :shell, :dealer),
         {:ok, state} <- connect_to(state, :control, :dealer) do
      with {:ok, state} <- shake_hands(state, :welcome, deadline()),
           {conn, out} = Conn.open(state.conn, :attach),
           {:ok, state} <- transmit(%{state | conn: conn}, out),
           {:ok, state} <- shake_hands(state, :attach, deadline()) do
        {:ok, state}
      else
        {:error, reason} -> {:error, state, start_error(reason)}
      end
    else
      {:error, state, reason} -> {:error, state, start_error(reason)}
      # What was subscribed by is closed by that.
      {:error, reason} -> {:error, start_error(reason)}
    end
  end

  defp connect_to(state, channel, type) do
    address = Map.fetch!(state.launched.connection, channel)
    # While a kernel is written to nobody listens, and the heartbeat waits: one that does not read is given up by this.
    patience = min(state.cfg.heartbeat || @patience_ms, @patience_ms)

    case Peer.connect(address, type, max_message_bytes: state.cfg.max_message_bytes, send_timeout: patience) do
      {:ok, peer} -> {:ok, Map.put(state, channel, peer)}
      {:error, reason} -> {:error, state, reason}
    end
  end

  defp disconnect(state) do
    for peer <- [state.shell, state.control, state.iopub], peer != nil, do: Peer.close(peer)
    %{state | shell: nil, control: nil, iopub: nil}
  end

  defp deadline, do: System.monotonic_time(:millisecond) + @handshake_ms

  defp start_error(%Error{} = error), do: error
  defp start_error(reason), do: Error.new(:kernel_start_failed, "the kernel cannot be connected to: #{inspect(reason)}")

  # The only waiting that is done here: nothing else can happen before it.
  defp shake_hands(%{launched: %{port: port}} = state, what, until) do
    receive do
      {^port, {:exit_status, status}} ->
        {:error, Launch.exit_error(state.launched, status)}

      {tag, socket, _} = message when tag in [:tcp, :tcp_error] and is_port(socket) ->
        shaken(state, message, what, until)

      {:tcp_closed, socket} = message when is_port(socket) ->
        shaken(state, message, what, until)
    after
      max(until - System.monotonic_time(:millisecond), 0) ->
        {:error, Error.new(:kernel_start_failed, "the kernel did not answer within #{@handshake_ms} ms")}
    end
  end

  defp shaken(state, message, what, until) do
    case hear(state, message) do
      {:ok, state, messages} ->
        {events, conn} = Enum.map_reduce(messages, state.conn, fn frames, conn -> swap(Conn.receive(conn, frames)) end)
        state = %{state | conn: conn}

        case Enum.find_value(events, &handshake(&1, what)) do
          nil -> shake_hands(state, what, until)
          {:ok, %{} = attached} -> attached(state, attached)
          :ok -> {:ok, state}
          {:error, error} -> {:error, error}
        end

      {:lost, _state, reason} ->
        {:error, reason}

      :unknown ->
        shake_hands(state, what, until)
    end
  end

  defp handshake(:welcome, :welcome), do: :ok
  defp handshake({:answer, :attach, {:ok, result, _buffers}}, :attach), do: {:ok, result}
  defp handshake({:answer, :attach, {:error, error}}, :attach), do: {:error, error}
  defp handshake(_event, _what), do: nil

  defp attached(state, %{"kernel" => %{"id" => id}, "limits" => %{} = limits})
       when is_binary(id) and byte_size(id) in 1..@longest_id do
    limits = Map.filter(limits, fn {name, limit} -> is_integer(limit) and limit >= least(name) end)
    {:ok, %{state | id: id, conn: %{state.conn | limits: limits}}}
  end

  defp attached(_state, _other) do
    Error.error(:kernel_start_failed, "the kernel's answer to bridge.attach does not fit the contract")
  end

  defp least("max_message_bytes"), do: @least_message_bytes
  defp least(_name), do: 1

  defp ready(state, began) do
    now = System.monotonic_time()
    info = %{id: state.id, pid: self(), os_pid: state.launched.os_pid, limits: state.conn.limits}
    Pool.hopeless(state.cfg, nil)
    Pool.ready(state.cfg, info)

    Telemetry.execute(
      state.cfg,
      [:bridge, :kernel, :start],
      %{duration: now - began, system_time: System.system_time()},
      %{kernel: state.id, pid: state.launched.os_pid, spare: false, deaths: state.deaths}
    )

    beat(%{state | status: :ready, failures: 0, born: now, heard: now, sources: MapSet.new(), pinged: nil})
  end

  # -- what commands want -----------------------------------------------------------------

  @impl true
  def handle_cast({:request, owner, ref, method, given}, %{status: status} = state) when status != :down do
    {params, buffers} = given.()
    {params, sources} = with_sources(params, state.sources)
    monitor = Process.monitor(owner)

    case Conn.request(state.conn, {owner, ref, monitor, sources}, method, params, buffers) do
      {:ok, conn, id, out} ->
        state = %{state | conn: conn, owners: Map.put(state.owners, monitor, ref), ids: Map.put(state.ids, ref, id)}
        send_out(state, out)

      {:error, error} ->
        Process.demonitor(monitor, [:flush])
        send(owner, {:bridge_kernel, ref, {:answer, {:error, error}}})
        {:noreply, state}
    end
  end

  def handle_cast({:request, owner, ref, _method, _given}, state) do
    send(owner, {:bridge_kernel, ref, {:gone, died(state, "is not there any more")}})
    {:noreply, state}
  end

  def handle_cast({:reply, {conn_id, callback}, reply}, %{conn: %{comm_id: conn_id}} = state) do
    {conn, out} = Conn.answer(state.conn, callback, reply)
    send_out(%{state | conn: conn}, out)
  end

  # A callback of a kernel that has died meanwhile.
  def handle_cast({:reply, _callback, _reply}, state), do: {:noreply, state}

  def handle_cast({:cancel, ref}, state), do: cancel_in_kernel(state, ref)

  def handle_cast({:credit, ref, credit}, state) do
    case state.ids do
      %{^ref => id} ->
        {conn, out} = Conn.notify(state.conn, :shell, "command.credit", %{"command" => id, "credit" => credit})
        send_out(%{state | conn: conn}, out)

      %{} ->
        {:noreply, state}
    end
  end

  def handle_cast({:forget_source, hash}, state) do
    {:noreply, %{state | sources: MapSet.delete(state.sources, hash)}}
  end

  def handle_cast(:retire, %{status: :ready} = state), do: drain(state, :retiring)

  def handle_cast(:retire, %{status: status} = state) when status in [:draining, :retiring],
    do: {:noreply, %{state | status: :retiring}}

  def handle_cast(:retire, state), do: {:stop, :normal, state}

  defp with_sources(params, known) do
    Enum.map_reduce(params, [], fn
      {:source, hash, json}, sources -> {if(MapSet.member?(known, hash), do: "null", else: json), [hash | sources]}
      part, sources -> {part, sources}
    end)
  end

  defp cancel_in_kernel(state, ref) do
    case Map.pop(state.ids, ref) do
      {nil, _ids} ->
        {:noreply, state}

      {id, ids} ->
        {_owner, _ref, monitor, _sources} = Conn.owner(state.conn, id)
        Process.demonitor(monitor, [:flush])
        {conn, out} = state.conn |> Conn.forget(id) |> Conn.notify(:control, "command.cancel", %{"command" => id})
        send_out(%{state | conn: conn, ids: ids, owners: Map.delete(state.owners, monitor)}, out)
    end
  end

  # -- what happens --------------------------------------------------------------------------

  @impl true
  def handle_info(:start, %{status: :down} = state), do: {:noreply, start(state)}
  def handle_info(:start, state), do: {:noreply, state}

  def handle_info({port, {:exit_status, status}}, %{launched: %{port: port}} = state) do
    lost(state, "ended with #{Launch.describe_status(status)}", status)
  end

  def handle_info({:DOWN, monitor, :process, _pid, _reason}, state) do
    case state.owners do
      %{^monitor => ref} -> cancel_in_kernel(state, ref)
      %{} -> {:noreply, state}
    end
  end

  def handle_info({:beat, beat}, %{beat: beat, status: status} = state) when status != :down, do: check(state)
  def handle_info({:beat, _other}, state), do: {:noreply, state}

  def handle_info({:bridge_recycle, _reason}, %{status: :ready} = state), do: drain(state, :draining)
  def handle_info({:bridge_recycle, _reason}, state), do: {:noreply, state}

  def handle_info({:bridge_drained, id}, %{id: id, status: :draining} = state) do
    state = finish(state, "recycled")
    {:noreply, again_later(state)}
  end

  def handle_info({:bridge_drained, id}, %{id: id, status: :retiring} = state) do
    {:stop, :normal, finish(state, "scale")}
  end

  def handle_info({:bridge_drained, _id}, state), do: {:noreply, state}

  def handle_info({tag, _socket, _} = message, state) when tag in [:tcp, :tcp_error], do: heard(state, message)
  def handle_info({:tcp_closed, _socket} = message, state), do: heard(state, message)
  # A port that was closed, the exit of whatever was linked while something was started.
  def handle_info({:EXIT, _from, _reason}, state), do: {:noreply, state}
  def handle_info({port, {:exit_status, _status}}, state) when is_port(port), do: {:noreply, state}
  # What somebody else's handler of telemetry, which is called here, has left behind.
  def handle_info(_other, state), do: {:noreply, state}

  defp heard(%{status: :down} = state, _message), do: {:noreply, state}

  defp heard(state, message) do
    case hear(state, message) do
      {:ok, state, messages} ->
        {closed?, state} = Enum.reduce(messages, {false, state}, &take/2)
        # The kernel has closed its comm: what it said with that counts still.
        if closed?, do: cut_off(state, "closed the connection"), else: {:noreply, state}

      {:lost, state, reason} ->
        cut_off(state, "lost its connection (#{inspect(reason)})")

      :unknown ->
        {:noreply, state}
    end
  end

  # One after the other: what a command said before its answer is told to it while it is still known.
  defp take(frames, {closed?, state}) do
    {conn, event} = Conn.receive(state.conn, frames)
    {closed? or event == :closed, on_event(event, %{state | conn: conn})}
  end

  defp hear(state, message) do
    Enum.find_value([:iopub, :shell, :control], :unknown, fn channel ->
      case Peer.stream(Map.fetch!(state, channel), message) do
        :unknown -> nil
        {:ok, peer, messages} -> listen(Map.put(state, channel, peer), channel, messages)
        {:error, peer, reason} -> {:lost, Map.put(state, channel, peer), reason}
      end
    end)
  end

  # Everything that a kernel says to us it says on iopub.
  defp listen(state, :iopub, messages) do
    {:ok, %{state | heard: System.monotonic_time()}, messages}
  end

  defp listen(state, _channel, _messages), do: {:ok, state, []}

  defp swap({conn, event}), do: {event, conn}

  defp on_event({:answer, {owner, ref, monitor, sources}, answer}, state) do
    Process.demonitor(monitor, [:flush])
    send(owner, {:bridge_kernel, ref, {:answer, answer}})
    known = if match?({:ok, _, _}, answer), do: Enum.into(sources, state.sources), else: state.sources
    %{state | sources: known, ids: Map.delete(state.ids, ref), owners: Map.delete(state.owners, monitor)}
  end

  defp on_event({:answer, :ping, {:ok, %{"rss" => rss} = answer, _}}, state) when is_integer(rss) and rss >= 0 do
    Pool.report(state.cfg, state.id, %{rss: rss, unresponsive: false})
    in_flight = if is_integer(answer["busy"]), do: answer["busy"], else: map_size(state.ids)
    said = %{kernel: state.id, pid: state.launched.os_pid}
    measured = %{rss: rss, in_flight: in_flight, round_trip: System.monotonic_time() - state.pinged}
    Telemetry.execute(state.cfg, [:bridge, :kernel, :memory], measured, said)
    %{state | pinged: nil}
  end

  defp on_event({:answer, :ping, _answer}, state), do: %{state | pinged: nil}

  defp on_event({:answer, {:ask, from}, answer}, state) do
    GenServer.reply(from, answer)
    state
  end

  defp on_event({:callback, command, id, method, params, buffers}, state) do
    callback = {state.conn.comm_id, id}

    case Conn.owner(state.conn, command) do
      {owner, ref, _monitor, _sources} ->
        send(owner, {:bridge_kernel, ref, {:callback, callback, method, params, buffers}})
        state

      _nobody ->
        error = Error.new(:cancelled, "command #{inspect(command)} is not running: nobody waits for what it calls back")
        {conn, out} = Conn.answer(state.conn, id, {:error, error})
        quietly(%{state | conn: conn}, out)
    end
  end

  defp on_event({:notification, command, method, params, buffers}, state) do
    tell(state, command, {:notification, method, params, buffers})
  end

  defp on_event({:output, command, name, text}, state), do: tell(state, command, {:output, name, text})

  defp on_event({:display, command, %{"data" => data} = content, update?}, state) do
    case data do
      %{@telemetry => batches} -> Telemetry.ingest(state.cfg, batches, state.id, secrets: &Secrets.all(state.cfg, &1))
      %{} -> tell(state, command, {:display, content, update?})
    end

    state
  end

  defp on_event(event, state) when event in [:closed, :welcome], do: state
  defp on_event({:dropped, reason}, state), do: log_dropped(state, reason)

  defp log_dropped(state, reason) do
    if reason != :late, do: Logger.debug("kernel #{state.id}: a message was dropped: #{reason}")
    state
  end

  defp tell(state, command, event) do
    with {owner, ref, _monitor, _sources} <- Conn.owner(state.conn, command) do
      send(owner, {:bridge_kernel, ref, event})
    end

    state
  end

  # -- sending ---------------------------------------------------------------------------------

  defp transmit(state, {channel, frames}) do
    case Peer.send(Map.fetch!(state, channel), frames) do
      :ok -> {:ok, state}
      {:error, reason} -> {:error, reason}
    end
  end

  defp send_out(state, out) do
    case transmit(state, out) do
      {:ok, state} -> {:noreply, state}
      {:error, reason} -> cut_off(state, "cannot be written to (#{inspect(reason)})")
    end
  end

  # A socket that fails says so by itself: as the next message.
  defp quietly(state, out) do
    with {:error, _reason} <- transmit(state, out),
         do: send(self(), {:tcp_closed, Map.fetch!(state, elem(out, 0)).socket})

    state
  end

  # -- is it alive? --------------------------------------------------------------------------------

  defp beat(%{cfg: %{heartbeat: nil}} = state), do: state

  defp beat(%{cfg: %{heartbeat: heartbeat}} = state) do
    {beat, pause} = {make_ref(), max(div(heartbeat, @beats), 1)}
    Process.send_after(self(), {:beat, beat}, pause)
    %{state | beat: beat, due: System.monotonic_time() + System.convert_time_unit(pause, :millisecond, :native)}
  end

  # A ping that was not answered counts only if it was sent a while ago. Time in which this process did not come to
  # listen is not the kernel's silence: a beat that is late, for this host or its machine stood still, says how much.
  defp check(state) do
    now = System.monotonic_time()
    state = %{state | heard: min(state.heard + max(now - state.due, 0), now)}
    silence = now - state.heard
    limit = System.convert_time_unit(state.cfg.heartbeat, :millisecond, :native)

    cond do
      state.pinged == nil or silence <= div(limit, 2) ->
        ping(beat(state))

      silence <= limit ->
        Pool.report(state.cfg, state.id, %{unresponsive: true})
        {:noreply, beat(state)}

      true ->
        measured = %{silence: silence, in_flight: map_size(state.ids)}
        said = %{kernel: state.id, pid: state.launched.os_pid, reason: "heartbeat"}
        Telemetry.execute(state.cfg, [:bridge, :kernel, :unresponsive], measured, said)
        lost(state, "has not answered for #{state.cfg.heartbeat} ms", nil)
    end
  end

  defp ping(%{pinged: sent} = state) when sent != nil, do: {:noreply, state}

  defp ping(state) do
    {:ok, conn, _id, out} = Conn.request(state.conn, :ping, "kernel.ping", ~s({"session":""}), [])
    Launch.trim_log(state.launched)
    send_out(%{state | conn: conn, pinged: System.monotonic_time()}, out)
  end

  # -- its end -------------------------------------------------------------------------------------

  defp died(state, how), do: Error.new(:kernel_died, "kernel #{state.id || state.number} #{how}")

  # The sockets of a process that dies close a moment before its exit is told, which says more.
  defp cut_off(%{launched: %{port: port}} = state, how) do
    receive do
      {^port, {:exit_status, status}} -> lost(state, "ended with #{Launch.describe_status(status)}", status)
    after
      @exit_ms -> lost(state, how, nil)
    end
  end

  defp lost(state, how, exit_code) do
    error = died(state, how)
    Launch.kill(state.launched)
    Pool.down(state.cfg, state.id, how)
    gone = stopped(state, how, exit_code, false, error)

    if state.status == :retiring do
      {:stop, :normal, gone}
    else
      # One that dies as soon as it runs must not be started as fast as the machine can.
      lived = System.monotonic_time() - state.born
      young? = lived < System.convert_time_unit(1, :second, :native)
      failures = if young?, do: state.failures + 1, else: 0
      {:noreply, again_later(%{gone | deaths: state.deaths + 1, failures: failures})}
    end
  end

  defp stopped(state, reason, exit_code, expected?, error) do
    disconnect(state)
    Launch.close(state.launched)

    for {_id, waiting} <- state.conn.waiting do
      case waiting do
        {owner, ref, monitor, _sources} ->
          Process.demonitor(monitor, [:flush])
          send(owner, {:bridge_kernel, ref, {:died, error}})

        {:ask, from} ->
          GenServer.reply(from, {:error, error})

        :ping ->
          :ok
      end
    end

    now = System.monotonic_time()

    Telemetry.execute(
      state.cfg,
      [:bridge, :kernel, :stop],
      %{duration: now - state.born, system_time: System.system_time(), lost: map_size(state.ids)},
      %{kernel: state.id, pid: state.launched.os_pid, exit_code: exit_code, expected: expected?, reason: reason}
    )

    %{state | status: :down, launched: nil, conn: nil, id: nil, beat: nil, ids: %{}, owners: %{}, pinged: nil}
    |> Map.merge(%{shell: nil, control: nil, iopub: nil})
  end

  defp drain(state, status) do
    Pool.drain(state.cfg, state.id)
    {:noreply, %{state | status: status}}
  end

  # The polite end: it is asked to go, and has a moment for it.
  defp finish(state, reason) do
    Pool.down(state.cfg, state.id, reason)
    {conn, out} = Conn.shut_down(state.conn)
    asked = transmit(%{state | conn: conn}, out)
    port = state.launched.port

    code =
      receive do
        {^port, {:exit_status, status}} -> status
      after
        if(match?({:ok, _}, asked), do: @farewell_ms, else: 0) -> nil
      end

    # To close a connection to who does not read takes long.
    if code == nil, do: Launch.kill(state.launched)
    stopped(state, reason, code, true, died(state, "was stopped"))
  end

  @impl true
  def handle_call({:ask, method, params}, from, %{status: status} = state) when status != :down do
    {:ok, conn, _id, out} = Conn.request(state.conn, {:ask, from}, method, params, [])
    send_out(%{state | conn: conn}, out)
  end

  def handle_call({:ask, _method, _params}, _from, state), do: {:reply, {:error, died(state, "is not there")}, state}

  @doc "Asks the kernel itself: `kernel.stats`, `rpc.discover`."
  @spec ask(pid(), String.t()) :: {:ok, map(), [binary()]} | {:error, Error.t()}
  def ask(kernel, method) do
    GenServer.call(kernel, {:ask, method, ~s({"session":""})}, @handshake_ms)
  catch
    :exit, _reason -> Error.error(:kernel_died, "the kernel did not answer")
  end

  @impl true
  def terminate(_reason, %{status: :down} = state) do
    if state.launched, do: Launch.close(state.launched)
    :ok
  end

  def terminate(_reason, state) do
    finish(state, "closed")
    :ok
  end

  # A crash report says nothing of what is in here.
  @impl {:format_status, 1} in GenServer.behaviour_info(:callbacks)
  def format_status(status), do: Bridge.Private.status(status, __MODULE__)
end
