defmodule Bridge.Pool.Desk do
  @moduledoc false
  # Which command gets which kernel, and when: places in kernels, the queue before them, circuits, what is measured. A
  # value: it is told what happens and when (`now`, in microseconds), and says what is to be done about it, in order.

  alias Bridge.Error
  alias Bridge.Pool.{Breaker, Kinds, Load, Queue, Routing, Window}

  @mean_weight 0.1
  @recent 20

  # Errors that say nothing about a command's own code.
  @of_the_caller [
    :cancelled,
    :circuit_open,
    :conflict,
    :draining,
    :host_closed,
    :invalid_arguments,
    :invalid_params,
    :invalid_request,
    :invalid_value,
    :kernel_died,
    :method_not_found,
    :not_found,
    :overloaded,
    :policy_denied,
    :queue_full,
    :quota_exceeded,
    :source_missing
  ]

  @enforce_keys [:concurrency, :routing, :breaker, :queue, :bound, :recycle, :rand]
  defstruct [
    :concurrency,
    :routing,
    :breaker,
    :queue,
    :bound,
    :recycle,
    :rand,
    kernels: %{},
    leases: %{},
    waiters: %{},
    alone: :gb_trees.empty(),
    nested: :gb_trees.empty(),
    next: 1,
    kinds: Kinds.new(),
    mean_us: 0.0,
    hopeless: nil,
    closed: false,
    effects: []
  ]

  @type t :: %__MODULE__{}
  @typedoc "Names a command: while it waits, and then its place."
  @type ref :: term()
  @type ask :: %{
          :session => String.t(),
          :subject => String.t(),
          optional(:exclude) => [String.t()],
          optional(:alone) => boolean(),
          optional(:nested) => boolean(),
          optional(any()) => any()
        }
  @type outcome :: :ok | {:error, atom()} | :died | :deadline | :cancelled
  @type effect ::
          {:grant, ref(),
           %{pid: pid(), id: String.t(), queue_us: integer(), candidates: integer(), expected_us: float()}}
          | {:fail, ref(), Error.t(), nil | %{waiting: integer(), session_waiting: integer()}}
          | {:recycle, map(), String.t()}
          | {:drained, map()}
          | {:breaker, Breaker.change()}
          | {:routing_failed, String.t()}

  @doc "`options`: concurrency, queue, routing, breaker, recycle, and `seed` for chance."
  @spec new(map()) :: t()
  def new(options) do
    %__MODULE__{
      concurrency: options.concurrency,
      routing: options.routing,
      breaker: Breaker.new(options.breaker),
      queue: Queue.new(options.queue),
      bound: options.queue,
      recycle: options.recycle,
      rand: :rand.seed_s(:exsss, options.seed)
    }
  end

  @doc "How many commands wait."
  @spec waiting(t()) :: non_neg_integer()
  def waiting(desk), do: map_size(desk.waiters)

  # -- kernels --------------------------------------------------------------------------

  @doc "A kernel is ready: `id`, `pid`, `os_pid`, and `most`, how many commands it takes at once."
  @spec join(t(), map(), integer()) :: {t(), [effect()]}
  def join(desk, info, now) do
    kernel = %{
      id: info.id,
      # Tells it from one that had its id before.
      number: desk.next,
      pid: info.pid,
      os_pid: info.os_pid,
      capacity: min(desk.concurrency, info.most),
      in_flight: 0,
      # Of these, what counts against the capacity: not the nested.
      running: 0,
      completed: 0,
      last_used: 0,
      load: Load.new(desk.mean_us),
      recent: Window.new(@recent),
      rss: 0,
      born: now,
      expires: expires(desk, now),
      unresponsive: false,
      # It has served long enough, and its owner was told.
      worn: false,
      draining: false,
      # It runs a command that is to be alone; it is kept free for one that waits to be.
      alone: false,
      reserved: false
    }

    %{desk | next: desk.next + 1, kernels: Map.put(desk.kernels, info.id, kernel)} |> dispatch(now) |> done()
  end

  # Varied by a tenth, so that kernels that started together do not end together.
  defp expires(%{recycle: %{age: age}}, now) when is_integer(age) do
    now + age * 1_000 + div(age * 1_000 * (:erlang.phash2(now, 201) - 100), 1_000)
  end

  defp expires(_desk, _now), do: nil

  @doc "That kernel has gone. Who has a place in it keeps that until it is given back."
  @spec leave(t(), String.t(), integer()) :: {t(), [effect()]}
  def leave(desk, id, now) do
    %{desk | kernels: Map.delete(desk.kernels, id), breaker: Breaker.forget(desk.breaker, id)}
    |> dispatch(now)
    |> despair()
    |> done()
  end

  @doc "What its owner has learnt of a kernel: `rss` in bytes, and whether it is `unresponsive`."
  @spec report(t(), String.t(), map(), integer()) :: {t(), [effect()]}
  def report(desk, id, news, now) do
    case desk.kernels do
      %{^id => kernel} -> desk |> put(Map.merge(kernel, Map.take(news, [:rss, :unresponsive]))) |> tick(now)
      _ -> {desk, []}
    end
  end

  @doc "Send it nothing more: `:drained` follows when it runs nothing any more."
  @spec drain(t(), String.t(), integer()) :: {:ok, t(), [effect()]} | :error
  def drain(desk, id, now) do
    case desk.kernels do
      %{^id => %{draining: true}} ->
        {:ok, desk, []}

      %{^id => kernel} ->
        desk = put(desk, %{kernel | draining: true})
        desk = if kernel.in_flight == 0, do: effect(desk, {:drained, kernel}), else: desk
        {desk, effects} = desk |> dispatch(now) |> despair() |> done()
        {:ok, desk, effects}

      _ ->
        :error
    end
  end

  @doc "Look at what time and memory have done to the kernels. Cheap; to be called now and then."
  @spec tick(t(), integer()) :: {t(), [effect()]}
  def tick(desk, now) do
    desk.kernels
    |> Map.values()
    |> Enum.reduce(desk, &wear(&2, &1.id, now))
    |> dispatch(now)
    |> done()
  end

  # One at a time: there should never be more than one that is about to leave.
  defp wear(desk, id, now) do
    with %{worn: false, draining: false} = kernel <- desk.kernels[id],
         reason when reason != nil <- worn_by(kernel, desk.recycle, now),
         false <- Enum.any?(desk.kernels, fn {_, other} -> other.worn end) do
      desk |> put(%{kernel | worn: true}) |> effect({:recycle, kernel, reason})
    else
      _ -> desk
    end
  end

  defp worn_by(kernel, recycle, now) do
    cond do
      is_integer(recycle[:commands]) and kernel.completed >= recycle[:commands] -> "commands"
      is_integer(recycle[:rss_bytes]) and kernel.rss > recycle[:rss_bytes] -> "rss"
      kernel.expires != nil and now >= kernel.expires -> "age"
      true -> nil
    end
  end

  @doc "Why no kernel will ever take a command, or nil: with no kernel left, that is what waits is told."
  @spec set_hopeless(t(), Error.t() | nil) :: {t(), [effect()]}
  def set_hopeless(desk, error), do: %{desk | hopeless: error} |> despair() |> done()

  @doc "No command gets a kernel any more, but those that tools of running ones send; those that wait are told so."
  @spec close(t()) :: {t(), [effect()]}
  def close(desk), do: %{desk | closed: true} |> fail_waiting(Error.new(:host_closed), [:queue, :alone]) |> done()

  # -- places ---------------------------------------------------------------------------

  @doc "A command asks for a place: a grant or an error follows, at once or later, unless it is withdrawn."
  @spec checkout(t(), ref(), ask(), integer()) :: {t(), [effect()]}
  def checkout(desk, ref, ask, now) do
    ask = Map.merge(%{exclude: [], alone: false, nested: false}, ask)

    with :ok <- open_to(desk, ask),
         :ok <- Breaker.check(desk.breaker, ask.subject, now),
         :none <- take(desk, ref, ask, now) do
      case hopeless(desk) do
        nil -> join_queue(desk, ref, ask, now)
        error -> fail(desk, ref, error)
      end
    else
      {:ok, desk} -> desk
      {:error, error} -> fail(desk, ref, error)
    end
    |> done()
  end

  @doc "The command is waited for by one that has a place: it goes on as a nested one, if it waits still."
  @spec hurry(t(), ref(), integer()) :: {t(), [effect()]}
  def hurry(desk, ref, now) do
    case desk.waiters do
      %{^ref => %{ask: %{nested: false} = ask} = waiter} ->
        desk = remove_waiter(desk, ref, waiter)
        waiter = %{waiter | line: :nested, ask: %{ask | nested: true}, reserved: nil}

        %{desk | nested: :gb_trees.insert(waiter.number, ref, desk.nested), waiters: Map.put(desk.waiters, ref, waiter)}
        |> dispatch(now)
        |> done()

      _ ->
        {desk, []}
    end
  end

  defp open_to(%{closed: true}, %{nested: false}), do: Error.error(:host_closed)
  defp open_to(_desk, _ask), do: :ok

  @doc "The command is not wanted any more: it leaves the line, or gives back its place. Does nothing if it has ended."
  @spec withdraw(t(), ref(), integer()) :: {t(), [effect()]}
  def withdraw(desk, ref, now) do
    case desk.waiters do
      %{^ref => waiter} -> desk |> remove_waiter(ref, waiter) |> dispatch(now) |> done()
      _ -> checkin(desk, ref, :cancelled, now)
    end
  end

  @doc "The command has ended: its place is free. Does nothing if that was said already."
  @spec checkin(t(), ref(), outcome(), integer()) :: {t(), [effect()]}
  def checkin(desk, ref, outcome, now) do
    case Map.pop(desk.leases, ref) do
      {nil, _leases} -> {desk, []}
      {lease, leases} -> %{desk | leases: leases} |> release(lease, of(outcome), now) |> dispatch(now) |> done()
    end
  end

  defp of({:error, name}) when name in @of_the_caller, do: :refused
  defp of({:error, _name}), do: :error
  defp of(:deadline), do: :timeout
  defp of(outcome) when outcome in [:ok, :died, :cancelled], do: outcome

  defp release(desk, %{ask: ask, job: job, number: number} = lease, outcome, now) do
    {breaker, changes} = Breaker.finish(desk.breaker, lease.kernel, ask.subject, outcome, lease.probe, now)
    desk = Enum.reduce(changes, %{desk | breaker: breaker}, &effect(&2, {:breaker, &1}))

    desk =
      if outcome not in [:died, :cancelled] and not ask.nested,
        do: %{desk | mean_us: moving(desk.mean_us, now - job.began)},
        else: desk

    case desk.kernels[lease.kernel] do
      %{number: ^number} = kernel ->
        # What fails at once must not look fast.
        {load, kinds} = Load.finish(kernel.load, desk.kinds, job, now, outcome in [:ok, :timeout])
        counted = outcome in [:ok, :error, :timeout]

        kernel = %{
          kernel
          | load: load,
            in_flight: kernel.in_flight - 1,
            running: kernel.running - if(ask.nested, do: 0, else: 1),
            completed: kernel.completed + 1,
            alone: kernel.alone and not lease.alone,
            recent: if(counted, do: Window.add(kernel.recent, outcome != :ok), else: kernel.recent)
        }

        desk = put(%{desk | kinds: kinds}, kernel)

        if kernel.draining and kernel.in_flight == 0,
          do: effect(desk, {:drained, kernel}),
          else: wear(desk, kernel.id, now)

      _gone ->
        desk
    end
  end

  defp moving(mean, value) when mean > 0, do: mean + @mean_weight * (value - mean)
  defp moving(_unknown, value), do: value * 1.0

  # -- a place at once ---------------------------------------------------------------------

  defp take(desk, ref, %{nested: true} = ask, now), do: take_nested(desk, ref, ask, 0, now)

  defp take(desk, ref, %{alone: true} = ask, now) do
    if :gb_trees.is_empty(desk.alone), do: take_alone(desk, ref, ask, 0, now), else: :none
  end

  defp take(desk, ref, ask, now) do
    if Queue.length(desk.queue) > 0, do: :none, else: lend(desk, with_room(desk), ref, ask, 0, now, false)
  end

  # Its outer command holds a place already, and would never give it back: it does not wait for one.
  defp take_nested(desk, ref, ask, queued, now) do
    with :none <- if(ask.alone, do: take_alone(desk, ref, ask, queued, now), else: :none) do
      candidates =
        case open(desk) do
          # Kernels that others should be kept off are better than none: its outer command waits for it there.
          [] -> for {_, kernel} <- desk.kernels, not kernel.unresponsive, do: kernel
          open -> open
        end

      lend(desk, candidates, ref, ask, queued, now, false)
    end
  end

  defp take_alone(desk, ref, ask, queued, now) do
    idle = Enum.filter(open(desk), &(&1.in_flight == 0))
    lend(desk, idle, ref, ask, queued, now, true)
  end

  defp open(desk) do
    for {_, kernel} <- desk.kernels, routable?(kernel), not kernel.reserved, not kernel.alone, do: kernel
  end

  defp routable?(kernel), do: not (kernel.draining or kernel.unresponsive)

  defp with_room(desk), do: Enum.filter(open(desk), &(&1.running < &1.capacity))

  # Choose one of the candidates: that to avoid and circuits are respected where there is another.
  defp lend(_desk, [], _ref, _ask, _queued, _now, _alone), do: :none

  defp lend(desk, candidates, ref, ask, queued, now, alone) do
    {desk, kernel} = choose(desk, candidates, ask, now)
    expected = Load.expected(kernel.load, desk.kinds, ask.subject, now)
    {load, job} = Load.begin(kernel.load, desk.kinds, ask.subject, now)
    {breaker, probe} = Breaker.begin(desk.breaker, kernel.id, ask.subject)

    kernel = %{
      kernel
      | load: load,
        last_used: desk.next,
        in_flight: kernel.in_flight + 1,
        running: kernel.running + if(ask.nested, do: 0, else: 1),
        alone: kernel.alone or alone
    }

    grant = %{
      pid: kernel.pid,
      id: kernel.id,
      queue_us: queued,
      candidates: length(candidates),
      expected_us: expected
    }

    lease = %{kernel: kernel.id, number: kernel.number, ask: ask, job: job, probe: probe, alone: alone}
    desk = %{desk | breaker: breaker, next: desk.next + 1, leases: Map.put(desk.leases, ref, lease)}
    {:ok, desk |> put(kernel) |> effect({:grant, ref, grant})}
  end

  defp choose(desk, [kernel], _ask, _now), do: {desk, kernel}

  defp choose(desk, candidates, ask, now) do
    candidates = preferably(candidates, &(&1.id not in ask.exclude))

    candidates =
      if Breaker.size(desk.breaker) > 0,
        do: preferably(candidates, &Breaker.admits?(desk.breaker, &1.id, ask.subject, now)),
        else: candidates

    case candidates do
      [kernel] ->
        {desk, kernel}

      several ->
        {kernel, rand, failed} = Routing.choose(desk.routing, ask, several, desk.kinds, desk.rand, now)
        desk = %{desk | rand: rand}
        {if(failed, do: effect(desk, {:routing_failed, failed}), else: desk), kernel}
    end
  end

  defp preferably(candidates, wanted?) do
    case Enum.filter(candidates, wanted?) do
      [] -> candidates
      wanted -> wanted
    end
  end

  # -- a place in time --------------------------------------------------------------------

  defp join_queue(desk, ref, %{nested: true} = ask, now) do
    {desk, waiter} = new_waiter(desk, :nested, ask, now)
    %{desk | nested: :gb_trees.insert(waiter.number, ref, desk.nested), waiters: Map.put(desk.waiters, ref, waiter)}
  end

  defp join_queue(desk, ref, %{alone: true} = ask, now) do
    if :gb_trees.size(desk.alone) >= desk.bound do
      refuse(desk, ref, ask, :gb_trees.size(desk.alone))
    else
      {desk, waiter} = new_waiter(desk, :alone, ask, now)

      # Reserve a kernel, so that it becomes idle.
      dispatch(
        %{desk | alone: :gb_trees.insert(waiter.number, ref, desk.alone), waiters: Map.put(desk.waiters, ref, waiter)},
        now
      )
    end
  end

  defp join_queue(desk, ref, ask, now) do
    case Queue.put(desk.queue, ask.session, ref) do
      {:ok, queue} ->
        {desk, waiter} = new_waiter(desk, :queue, ask, now)
        %{desk | queue: queue, waiters: Map.put(desk.waiters, ref, waiter)}

      :full ->
        refuse(desk, ref, ask, Queue.length(desk.queue))
    end
  end

  defp new_waiter(desk, line, ask, now) do
    {%{desk | next: desk.next + 1}, %{line: line, ask: ask, since: now, number: desk.next, reserved: nil}}
  end

  defp refuse(desk, ref, ask, waiting) do
    mine = Queue.waiting(desk.queue, ask.session)
    whose = if mine > 0 and mine < waiting, do: ", #{mine} of them of session #{inspect(ask.session)}", else: ""

    wait =
      case expected_wait_us(desk) do
        nil -> "how long the wait would be is not known yet"
        us -> "the wait would be about #{Float.round(us / 1_000_000, 3)} s"
      end

    message = "#{waiting} commands wait for a kernel#{whose}, and #{desk.bound} may at most: #{wait}"
    figures = %{waiting: waiting, session_waiting: mine}
    effect(desk, {:fail, ref, Error.new(:queue_full, message), figures})
  end

  # How long a command that joined the queue now would wait; nil as long as no command has ended.
  defp expected_wait_us(%{mean_us: mean}) when mean == 0, do: nil

  defp expected_wait_us(desk) do
    places = Enum.sum(for {_, kernel} <- desk.kernels, routable?(kernel), do: kernel.capacity)
    desk.mean_us * (Queue.length(desk.queue) + 1) / max(places, 1)
  end

  defp remove_waiter(desk, ref, waiter) do
    desk = unreserve(%{desk | waiters: Map.delete(desk.waiters, ref)}, waiter)

    case waiter.line do
      :queue -> %{desk | queue: Queue.remove(desk.queue, ref)}
      line -> Map.update!(desk, line, &:gb_trees.delete(waiter.number, &1))
    end
  end

  defp unreserve(desk, %{reserved: nil}), do: desk

  defp unreserve(desk, %{reserved: id}) do
    case desk.kernels do
      %{^id => kernel} -> put(desk, %{kernel | reserved: false})
      _ -> desk
    end
  end

  defp dispatch(desk, _now) when map_size(desk.waiters) == 0, do: desk
  defp dispatch(desk, now), do: desk |> dispatch_nested(now) |> dispatch_alone(now) |> dispatch_queue(now)

  defp dispatch_nested(desk, now) do
    with {_number, ref} <- first(desk.nested),
         waiter = Map.fetch!(desk.waiters, ref),
         {:ok, desk} <- grant(desk, ref, waiter, now, &take_nested(&1, ref, waiter.ask, &2, now)) do
      dispatch_nested(desk, now)
    else
      :none -> desk
    end
  end

  # Give the first of those that want a kernel to themselves one that is idle; else keep others off one.
  defp dispatch_alone(desk, now) do
    with {_number, ref} <- first(desk.alone),
         waiter = Map.fetch!(desk.waiters, ref),
         {:ok, desk, kernel} <- reserve(desk, ref, waiter) do
      if kernel.in_flight > 0 do
        desk
      else
        waiter = Map.fetch!(desk.waiters, ref)
        lend = &lend(&1, [Map.fetch!(&1.kernels, kernel.id)], ref, waiter.ask, &2, now, true)
        {:ok, desk} = grant(desk, ref, waiter, now, lend)
        dispatch_alone(desk, now)
      end
    else
      :none -> desk
      {:none, desk} -> desk
    end
  end

  defp reserve(desk, ref, waiter) do
    with id when id != nil <- waiter.reserved,
         %{} = kernel <- desk.kernels[id],
         true <- routable?(kernel) do
      {:ok, desk, kernel}
    else
      _ ->
        desk = unreserve(desk, waiter)

        case preferably(open(desk), &(&1.id not in waiter.ask.exclude)) do
          [] ->
            {:none, put_waiter(desk, ref, %{waiter | reserved: nil})}

          kernels ->
            kernel = %{Enum.min_by(kernels, &{&1.in_flight, &1.last_used}) | reserved: true}
            {:ok, desk |> put(kernel) |> put_waiter(ref, %{waiter | reserved: kernel.id}), kernel}
        end
    end
  end

  defp put_waiter(desk, ref, waiter), do: %{desk | waiters: Map.put(desk.waiters, ref, waiter)}

  defp dispatch_queue(desk, now) do
    with candidates when candidates != [] <- with_room(desk),
         {ref, queue} <- Queue.pop(desk.queue) do
      waiter = Map.fetch!(desk.waiters, ref)
      lend = &lend(&1, candidates, ref, waiter.ask, &2, now, false)
      {:ok, desk} = grant(%{desk | queue: queue}, ref, waiter, now, lend)
      dispatch_queue(desk, now)
    else
      _ -> desk
    end
  end

  # Give the waiter its place, or the error that meets it now; `:none` if there is no place for it yet.
  defp grant(desk, ref, waiter, now, lend) do
    case Breaker.check(desk.breaker, waiter.ask.subject, now) do
      {:error, error} ->
        {:ok, desk |> remove_waiter(ref, waiter) |> fail(ref, error)}

      :ok ->
        with {:ok, desk} <- lend.(desk, now - waiter.since) do
          {:ok, remove_waiter(desk, ref, waiter)}
        end
    end
  end

  defp first(tree) do
    if :gb_trees.is_empty(tree), do: :none, else: :gb_trees.smallest(tree)
  end

  # -- no place, ever ----------------------------------------------------------------------

  defp hopeless(%{hopeless: nil}), do: nil
  defp hopeless(desk), do: if(Enum.any?(desk.kernels, fn {_, k} -> not k.draining end), do: nil, else: desk.hopeless)

  defp despair(desk) do
    case hopeless(desk) do
      nil -> desk
      error -> fail_waiting(desk, error)
    end
  end

  defp fail_waiting(desk, error, lines \\ [:queue, :alone, :nested]) do
    for {ref, waiter} <- desk.waiters, waiter.line in lines, reduce: desk do
      desk -> desk |> remove_waiter(ref, waiter) |> fail(ref, error)
    end
  end

  defp fail(desk, ref, error), do: effect(desk, {:fail, ref, error, nil})

  # -- what is to be done --------------------------------------------------------------------

  defp put(desk, kernel), do: %{desk | kernels: Map.put(desk.kernels, kernel.id, kernel)}
  defp effect(desk, effect), do: %{desk | effects: [effect | desk.effects]}
  defp done(desk), do: {%{desk | effects: []}, Enum.reverse(desk.effects)}
end
