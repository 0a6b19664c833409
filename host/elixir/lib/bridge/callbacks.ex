defmodule Bridge.Callbacks do
  @moduledoc false
  # Answers what a kernel calls back for a command: reads, staged writes, tools. All but writes are journaled, so that they
  # can be repeated. Runs in the command's process; tools run in tasks of their own.

  alias Bridge.{Config, Error, JSON, Journal, Kernel, Request, SessionStore, Telemetry, Tools, Value}
  alias Bridge.Command.{Answer, Current}
  alias Bridge.Store.Staged
  alias Bridge.Telemetry.Trace

  # Of one command; more wait.
  @most_tools 1_000

  @type command :: Bridge.Command.t()
  @type reply :: {:ok, iodata(), [binary()]} | {:error, Error.t()}

  @doc "Answers a callback: now, or when its tool has ended."
  @spec serve(command(), term(), String.t(), map(), [binary()]) :: {:ok, command()} | {:diverged, command(), Error.t()}
  def serve(state, callback, "session.set", params, buffers) do
    with %{"name" => name, "value" => json} when is_binary(name) <- params,
         {:ok, if_version} <- if_version(params),
         {:ok, value} <- Value.decode(json, buffers, path: name),
         {:ok, version, staged} <- Staged.set(state.staged, state.cfg, state.session, name, value, if_version) do
      answer(%{state | staged: staged}, callback, ok(%{"version" => version}))
    else
      {:error, error} -> answer(state, callback, {:error, error})
      _other -> answer(state, callback, invalid("session.set"))
    end
  end

  def serve(state, callback, "session.delete", params, _buffers) do
    with %{"name" => name} when is_binary(name) <- params,
         {:ok, if_version} <- if_version(params),
         {:ok, staged} <- Staged.delete(state.staged, state.cfg, state.session, name, if_version) do
      answer(%{state | staged: staged}, callback, ok(%{}))
    else
      {:error, error} -> answer(state, callback, {:error, error})
      _other -> answer(state, callback, invalid("session.delete"))
    end
  end

  def serve(state, callback, method, params, buffers) do
    with {:ok, seq} <- seq(params), :ok <- shape(method, params) do
      asked = Journal.asked(method, params)

      if state.journal.replaying,
        do: replay(state, callback, method, params, asked, seq, buffers),
        else: fresh(state, callback, method, params, asked, seq, buffers)
    else
      {:error, error} -> answer(state, callback, {:error, error})
    end
  end

  defp seq(%{"seq" => seq}) when is_integer(seq) and seq >= 1, do: {:ok, seq}
  defp seq(%{"seq" => nil}), do: {:ok, nil}
  defp seq(params) when not is_map_key(params, "seq"), do: {:ok, nil}
  defp seq(_params), do: invalid("seq")

  defp if_version(%{"if_version" => version}) when is_integer(version) and version >= 0, do: {:ok, version}
  defp if_version(%{"if_version" => nil}), do: {:ok, nil}
  defp if_version(params) when not is_map_key(params, "if_version"), do: {:ok, nil}
  defp if_version(_params), do: invalid("if_version")

  # Closed: what is not here is no callback.
  defp shape("tool.call", %{"name" => name} = params) when is_binary(name) do
    args? = is_list(Map.get(params, "args", []))
    if args? and is_map(Map.get(params, "kwargs", %{})), do: :ok, else: invalid("tool.call")
  end

  defp shape("session.get", %{"name" => name}) when is_binary(name), do: :ok

  defp shape("session.get_many", %{"names" => names}) when is_list(names) do
    if Enum.all?(names, &is_binary/1), do: :ok, else: invalid("session.get_many")
  end

  defp shape("instance.fetch", %{"ref" => ref}) when is_binary(ref), do: :ok
  defp shape(method, _params) when method in ["session.list", "tool.list"], do: :ok

  defp shape(method, _params) when method in ["tool.call", "session.get", "session.get_many", "instance.fetch"],
    do: invalid(method)

  defp shape(method, _params), do: Error.error(:method_not_found, "a host has no #{inspect(method)}")

  defp invalid(what), do: Error.error(:invalid_params, "#{what}: the parameters do not fit the contract")

  # -- again --------------------------------------------------------------------------------

  defp replay(state, callback, method, params, asked, seq, buffers) do
    case Journal.match(state.journal, seq, method, asked, Journal.digest(method, asked, buffers)) do
      {:ok, journal, nil, forgotten} ->
        state = %{state | journal: journal}
        if forgotten != [], do: SessionStore.forget_calls(state.cfg, state.id, forgotten)
        fresh(state, callback, method, params, asked, seq, buffers)

      {:ok, journal, entry, []} ->
        repeat(%{state | journal: journal}, callback, entry, params)

      {:error, error} ->
        Kernel.answer(state.place.pid, callback, {:error, error})
        {:diverged, state, error}
    end
  end

  # As the first time; a tool that still runs answers both.
  defp repeat(state, callback, entry, params) do
    tell_replay(state, entry)

    case entry do
      %{reply: nil, versions: %{} = versions} ->
        reply = read_again(state, entry.method, versions)
        answer(put(state, %{entry | reply: reply}), callback, reply)

      %{reply: nil, lost: true} ->
        case Tools.fetch(state.session, entry.asked |> hd(), bridge: state.cfg.name) do
          {:ok, tool} ->
            entry = %{entry | lost: false, waiting: [callback]}
            {:ok, run_tool(put(state, entry), tool, entry, params, true)}

          {:error, error} ->
            answer(state, callback, {:error, error})
        end

      %{reply: nil} ->
        {:ok, put(state, %{entry | waiting: [callback | entry.waiting]})}

      %{reply: reply} ->
        answer(state, callback, reply)
    end
  end

  defp put(state, entry), do: %{state | journal: Journal.put(state.journal, entry)}

  defp tell_replay(state, entry) do
    if state.trace.sampled do
      about = if entry.method == "tool.call", do: hd(entry.asked), else: entry.method
      said = %{method: entry.method, about: about, session: state.session, command_id: state.id}
      Telemetry.execute(state.cfg, [:bridge, :journal, :replay], %{n: entry.n}, said)
    end
  end

  # A reading that another life of this host answered: the same versions, as far as they are kept.
  defp read_again(state, method, versions) do
    found =
      for {name, version} <- versions, into: %{} do
        kept =
          case SessionStore.history({state.session, state.cfg.name} |> session(), name) do
            {:ok, history} -> Enum.find(history, &(&1.version == version and not &1.deleted))
            {:error, _gone} -> nil
          end

        case kept || Staged.fetch(state.staged, state.cfg, state.session, name) do
          %{value: value} -> {name, {value, version}}
          {:ok, value, _version} -> {name, {value, version}}
          :error -> {name, :error}
        end
      end

    found = Map.reject(found, &match?({_, :error}, &1))

    case {method, Map.to_list(found)} do
      {"session.get", [{name, {value, version}}]} -> value_reply(name, value, version)
      {"session.get", []} -> Error.error(:not_found, "variable #{inspect(hd(Map.keys(versions)))} is gone")
      {_many, _} -> values_reply(found)
    end
  end

  defp session({id, bridge}), do: %Bridge.Session{id: id, bridge: bridge}

  # -- for the first time -----------------------------------------------------------------------

  defp fresh(state, callback, "tool.call", params, [name | _] = asked, seq, buffers) do
    case Tools.fetch(state.session, name, bridge: state.cfg.name) do
      {:ok, tool} ->
        {journal, entry} = Journal.record(state.journal, seq, "tool.call", asked, buffers, not tool.idempotent)
        entry = %{entry | waiting: [callback]}
        {:ok, run_tool(%{state | journal: Journal.put(journal, entry)}, tool, entry, params, false)}

      {:error, error} ->
        answer(state, callback, {:error, error})
    end
  end

  defp fresh(state, callback, method, _params, asked, seq, buffers) do
    {reply, versions} = read(state, method, asked)
    {journal, entry} = Journal.record(state.journal, seq, method, asked, buffers, false)
    {journal, reply} = Journal.once(journal, entry.digest, reply)
    entry = %{entry | reply: reply, versions: versions}
    state = %{state | journal: Journal.put(journal, entry)}
    if versions != nil and durable?(state), do: note(state, entry)
    answer(state, callback, reply)
  end

  defp note(state, entry) do
    with :ok <- SessionStore.record_call(state.cfg, state.id, entry.n, recorded(entry)) do
      SessionStore.record_reply(state.cfg, state.id, entry.n, {:versions, entry.versions})
    end
  end

  defp recorded(entry) do
    %{seq: entry.seq, method: entry.method, asked: {entry.asked, entry.buffers}, effect: entry.effect}
  end

  defp durable?(state), do: state.cfg.store != nil

  @doc "Puts all that was called back where it outlives the command, which somebody may come back for."
  @spec keep(command()) :: :ok
  def keep(state) do
    if not durable?(state) do
      for entry <- Journal.entries(state.journal) do
        SessionStore.record_call(state.cfg, state.id, entry.n, recorded(entry))
        if entry.reply, do: SessionStore.record_reply(state.cfg, state.id, entry.n, kept(entry.reply))
      end
    end

    :ok
  end

  @doc "A reply as it is kept."
  @spec kept(reply()) :: term()
  def kept({:ok, result, buffers}), do: {:ok, IO.iodata_to_binary(result), buffers}
  def kept({:error, error}), do: {:error, Error.Wire.to_wire(error)}

  defp read(state, "session.get", [name]) do
    case Staged.fetch(state.staged, state.cfg, state.session, name) do
      {:ok, value, version} -> {value_reply(name, value, version), own(state, %{name => version})}
      :error -> {no_variable(state, name), nil}
    end
  end

  defp read(state, "session.get_many", names) do
    found = Staged.fetch_many(state.staged, state.cfg, state.session, Enum.uniq(names))
    {values_reply(found), own(state, Map.new(found, fn {name, {_, version}} -> {name, version} end))}
  end

  defp read(state, "session.list", _asked) do
    listed =
      for known <- Staged.list(state.staged, state.cfg, state.session) do
        Map.new([:name, :version, :type, :size], &{Atom.to_string(&1), Map.fetch!(known, &1)})
      end

    {ok(%{"variables" => listed}), nil}
  end

  defp read(state, "instance.fetch", [ref]) do
    with {:ok, record} <- Request.instance(state.cfg, state.session, ref),
         {:ok, written, buffers} <- Request.record(record, 0) do
      {{:ok, json(written), buffers}, nil}
    else
      {:error, error} -> {{:error, error}, nil}
    end
  end

  defp read(state, "tool.list", _asked) do
    tools =
      for tool <- Tools.list!(state.session, bridge: state.cfg.name) do
        %{"name" => tool.name, "description" => tool.description, "schema" => tool.schema}
      end

    {ok(%{"tools" => tools}), nil}
  end

  # What the command itself has staged is written anew by the next attempt: there is no version of it to come back to.
  defp own(state, versions) do
    mine = Staged.ops(state.staged) |> Enum.map(&elem(&1, 1))
    if Enum.any?(mine, &is_map_key(versions, &1)), do: nil, else: versions
  end

  defp no_variable(state, name) do
    there = state.staged |> Staged.list(state.cfg, state.session) |> Enum.map_join(", ", & &1.name)

    Error.error(:not_found, "session #{inspect(state.session)} has no variable #{inspect(name)}",
      remedy: "There #{if there == "", do: "is none", else: "is #{there}"}."
    )
  end

  defp value_reply(name, value, version) do
    with {:ok, json, buffers} <- Value.encode(value, name) do
      {:ok, json(%{"value" => json, "version" => version}), buffers}
    end
  end

  defp values_reply(found) do
    found = Enum.to_list(found)

    with {:ok, trees, buffers} <- Value.encode_many(for {name, {value, _}} <- found, do: {name, value}) do
      values = for {{name, _found}, json} <- Enum.zip(found, trees), into: %{}, do: {name, json}
      {:ok, json(%{"values" => values}), buffers}
    end
  end

  defp ok(result), do: {:ok, json(result), []}

  # Kept as long as the command runs, and sent on twice: as a list it would be many times as large, and copied.
  defp json(term), do: term |> JSON.encode!() |> IO.iodata_to_binary()

  defp answer(state, callback, reply) do
    if state.place, do: Kernel.answer(state.place.pid, callback, reply)
    {:ok, state}
  end

  # -- tools ----------------------------------------------------------------------------------------

  defp run_tool(state, tool, entry, params, known?) when map_size(state.tools) >= @most_tools do
    %{state | tools_due: :queue.in({tool, entry, params, known?}, state.tools_due)}
  end

  defp run_tool(state, tool, entry, params, known?) do
    trace = Trace.child_of(traceparent(params) || Trace.traceparent(state.trace))

    current = %Current{
      bridge: state.cfg.name,
      until: state.terms.until,
      depth: state.terms.depth,
      keys: if(state.terms.key, do: [{state.session, state.terms.key} | state.terms.keys], else: state.terms.keys),
      call: %{id: "#{state.id}:#{entry.n}", tool: tool.name, command: state.id, session: state.session}
    }

    {cfg, id, leader} = {state.cfg, state.id, state.leader}
    durable? = durable?(state) and not known?
    hook = Answer.hook(state)

    task =
      Task.Supervisor.async_nolink(Config.process(cfg.name, :tool_tasks), fn ->
        Process.group_leader(self(), leader)
        Current.put(current)

        reply =
          Trace.within(trace, fn ->
            # On disk before it happens: a host that dies now must know that it may have happened.
            with :ok <- if(durable?, do: note_call(cfg, id, entry), else: :ok) do
              call(cfg, tool, entry, trace, id, hook)
            end
          end)

        if durable?(%{cfg: cfg}), do: SessionStore.record_reply(cfg, id, entry.n, kept(reply))
        {:tool, reply}
      end)

    timer = if tool.timeout, do: Process.send_after(self(), {:tool_timeout, task.ref}, tool.timeout)
    put_in(state.tools[task.ref], %{pid: task.pid, n: entry.n, tool: tool, timer: timer, callback: hd(entry.waiting)})
  end

  defp note_call(cfg, id, entry), do: SessionStore.record_call(cfg, id, entry.n, recorded(entry), sync: entry.effect)

  defp traceparent(%{"traceparent" => header}), do: if(Trace.traceparent?(header), do: header)
  defp traceparent(_params), do: nil

  # The tool's result, or what it raised.
  defp call(cfg, tool, entry, trace, command, hook) do
    said = Map.merge(Trace.metadata(trace), %{tool: tool.name, session: tool.session, command_id: command})

    began = System.monotonic_time()
    tell(cfg, trace, :start, %{system_time: System.system_time()}, said)

    reply =
      try do
        [_name, args, kwargs] = entry.asked
        placed = for {json, i} <- Enum.with_index(args), do: {"args[#{i}]", json}

        with {:ok, values} <- Value.decode_many(placed ++ Enum.to_list(kwargs), entry.buffers, hook: hook),
             {args, named} = Enum.split(values, length(placed)),
             kwargs = kwargs |> Enum.map(&elem(&1, 0)) |> Enum.zip(named) |> Map.new(),
             {:ok, arguments} <- Tools.arguments(tool, args, kwargs),
             {:ok, json, buffers} <- Value.encode(Tools.invoke(tool, arguments), "#{tool.name}()") do
          {:ok, json(%{"value" => json}), buffers}
        end
      catch
        kind, reason -> {:error, Error.Wire.from_caught(kind, reason, __STACKTRACE__)}
      end

    measured = %{duration: System.monotonic_time() - began}

    case reply do
      {:ok, _result, _buffers} -> tell(cfg, trace, :stop, measured, said)
      {:error, error} -> tell(cfg, trace, :exception, measured, Map.put(said, :error, error.type))
    end

    reply
  end

  defp tell(cfg, %{sampled: true}, last, measured, said),
    do: Telemetry.execute(cfg, [:bridge, :tool, last], measured, said)

  defp tell(_cfg, _trace, _last, _measured, _said), do: :ok

  @doc "A tool has ended: whoever asked for it is told, this attempt or an earlier one's repetition."
  @spec tool_ended(command(), map(), reply()) :: command()
  def tool_ended(state, tool, reply) do
    state = told(state, tool, reply)

    case :queue.out(state.tools_due) do
      {:empty, _none} -> state
      {{:value, {tool, entry, params, known?}}, due} -> run_tool(%{state | tools_due: due}, tool, entry, params, known?)
    end
  end

  defp told(state, tool, reply) do
    case Map.get(state.journal.entries, tool.n) do
      # Of more than a journal holds.
      nil ->
        {:ok, state} = answer(state, tool.callback, reply)
        state

      entry ->
        for callback <- entry.waiting, state.place != nil, do: Kernel.answer(state.place.pid, callback, reply)
        put(state, %{entry | reply: reply, waiting: []})
    end
  end

  @doc "Notes the reply for a tool that did not come to do so itself."
  @spec record(command(), map(), reply()) :: :ok
  def record(state, tool, reply) do
    # A disk that fails fails the commit.
    if durable?(state), do: SessionStore.record_reply(state.cfg, state.id, tool.n, kept(reply))
    :ok
  end

  @doc "Notes the reply of a tool whose command has ended already, and may be gone on with."
  @spec record_late(command(), map(), reply()) :: :ok
  def record_late(state, tool, reply) do
    if not durable?(state), do: SessionStore.record_reply(state.cfg, state.id, tool.n, kept(reply))
    :ok
  end

  @doc "Tools that wait for their turn do not run any more: nothing of them has happened."
  @spec forget_due(command()) :: command()
  def forget_due(state) do
    due = for {_tool, entry, _params, _known?} <- :queue.to_list(state.tools_due), do: entry.n
    %{state | tools_due: :queue.new(), journal: Journal.drop(state.journal, due)}
  end

  @doc "The reply for a tool whose task was killed."
  @spec crashed(Tools.Registered.t(), term()) :: reply()
  def crashed(tool, reason) do
    Error.error(:tool_error, "tool #{inspect(tool.name)} was ended: #{Bridge.Private.format_exit(reason)}", type: "exit")
  end

  @doc "The reply for a tool that took longer than it may."
  @spec timed_out(Tools.Registered.t()) :: reply()
  def timed_out(tool) do
    Error.error(:tool_error, "tool #{inspect(tool.name)} took longer than #{tool.timeout} ms, and was ended",
      type: "timeout",
      remedy: "Give it more time: Bridge.Tools.register(session, name, fun, timeout: …)."
    )
  end
end
