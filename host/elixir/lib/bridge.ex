defmodule Bridge do
  @moduledoc """
  Drives stateless Python kernels from Elixir.

  Sessions, with their variables, instances, tools and functions, are here. A kernel is a Python process that runs one
  command, calls back for what it needs, answers and forgets: it may be killed at any instant with nothing lost.

      {:ok, _} = Bridge.start_link(kernels: 2)
      {:ok, 5.0} = Bridge.call("demo", "math.hypot", [3, 4])

      Bridge.SessionStore.set_variable("demo", "limit", 3)
      Bridge.Tools.register("demo", "double", fn %{"x" => x} -> 2 * x end)

      Bridge.define("demo", "capped", \"""
      def capped(ctx, x):
          return min(ctx.call_tool("double", x=x), ctx["limit"])
      \""")

      {:ok, 3} = Bridge.call("demo", "capped", [7])

  In a supervision tree it is `{Bridge, kernels: 2, name: MyApp.Bridge}`; every function then takes `bridge: MyApp.Bridge`,
  or a session that says so (`session/2`).

  Functions return `{:ok, value}` or `{:error, %Bridge.Error{}}`; those that end in `!` return the value, or raise. Times
  are milliseconds. Who asks for a command and dies has it cancelled: `Task.shutdown/2` is how to cancel one.

  ## Options of `start_link/1`

  | option | what | default |
  | --- | --- | --- |
  | `name:` | what it is called | `Bridge` |
  | `kernels:` | how many to start | 1 |
  | `python:` | the Python that has `bridge-kernel` | `$BRIDGE_PYTHON`, else `python3` |
  | `arguments:`, `env:` | added to each kernel's command line, environment | `[]`, `%{}` |
  | `store:` | a directory in which sessions survive | `nil`: in memory |
  | `ttl:` | how long a new session may be unused before it expires | `nil`: for ever |
  | `quota:` | how much a session may hold: `%{things:, bytes:}` | 100,000 and 1 GiB |
  | `retries:` | how often a command runs again when its kernel dies | 2 |
  | `concurrency:` | how many commands a kernel runs at once | 64 |
  | `queue:` | how many commands may wait | 10,000 |
  | `routing:` | `:fastest`, `:least_loaded`, `:random`, or a function of what is asked (`session`, `subject`) and the kernels (`id`, `in_flight`, `expected` ms), which gives the id of one | `:fastest` |
  | `heartbeat:` | how long a kernel may be silent before it is killed; `nil`: for ever | 30,000 |
  | `recycle:` | when a kernel is replaced: `%{commands:, age:, rss_bytes:}` | never |
  | `breaker:` | when a command is held back: see below | `%{}` |
  | `start_timeout:`, `shutdown:` | how long a kernel may take to start, commands to end | 60,000 and 30,000 |
  | `on_output:` | takes what commands print, instead of the group leader of who asked | `nil` |

  A command that keeps ending its kernels, or lets its deadlines pass without a word of them, is held back (`:circuit_open`)
  for a while that doubles each time. `breaker:` says when: `%{kernel_failures: 3, command_failures: 5, cooldown: 10_000}` are
  so many in a row on one kernel, on any, and how long at first. What Python code raises does not count, unless
  `error_rate: 0.8` says that a command is to be held back when so many of its last `error_window: 20` calls failed. `nil` is
  the default too. Apart from this, a command that has ended three kernels is quarantined: see `release/2`.
  """

  alias Bridge.{
    Commands,
    Config,
    Error,
    Inspected,
    Interrupted,
    Kernels,
    Options,
    Pool,
    Recovery,
    Ref,
    Result,
    Secrets,
    Session,
    SessionStore,
    Store
  }

  @type session :: Session.t() | String.t()
  @type result(value) :: {:ok, value} | {:error, Error.t()}
  @typedoc "By place, by name, or both: `[1, 2]`; `%{x: 1}` or `[x: 1]`; `{[1], %{x: 2}}`."
  @type arguments :: list() | map() | {list(), map()}

  @calling [:bridge, :deadline, :retries, :idempotency_key, :secrets, :kwargs]

  @inspecting [:bridge, :session, :deadline, :retries]

  # -- the processes ------------------------------------------------------------------------

  @doc """
  Starts a bridge, linked to the caller: its store, its pool, its kernels.

  It does not wait for the kernels: commands do. `Bridge.doctor/1` says what is missing if they do not start. Options are
  in the module's documentation; a wrong one raises `ArgumentError`.

  As every `start_link` it gives `{:error, {:already_started, pid}}` if one of that name runs (`Bridge.stop/2` ends it), and
  takes a caller that does not trap exits with it where it cannot start, as with a store that another host has open.
  """
  @spec start_link(keyword()) :: Supervisor.on_start() | {:error, Error.t()}
  def start_link(opts \\ []) do
    cfg = opts |> Keyword.put_new_lazy(:python, &Config.python/0) |> Config.new!()
    random = Base.encode16(:crypto.strong_rand_bytes(4), case: :lower)
    cfg = %{cfg | runtime_dir: Path.join(System.tmp_dir!(), "bridge-" <> random)}

    with {:ok, _json} <- Bridge.JSON.backend() do
      case Bridge.Supervisor.start_link(cfg) do
        {:error, {:shutdown, {:failed_to_start_child, _child, {:shutdown, %Error{} = error}}}} -> {:error, error}
        {:error, {:shutdown, {:failed_to_start_child, _child, %Error{} = error}}} -> {:error, error}
        other -> other
      end
    end
  end

  @doc false
  @spec child_spec(keyword()) :: Supervisor.child_spec()
  def child_spec(opts) do
    start = {__MODULE__, :start_link, [Config.hide_env(opts)]}
    %{id: Keyword.get(opts, :name, Bridge), start: start, type: :supervisor}
  end

  @doc """
  Stops a bridge: takes no more commands, waits for those that run (`timeout` ms, by default the option `shutdown:`), ends
  the kernels. What still runs then is listed by `interrupted/1` when the store is opened again.
  """
  @spec stop(atom(), timeout() | nil) :: :ok
  def stop(bridge \\ Bridge, timeout \\ nil) do
    with {:ok, cfg} <- Config.fetch(bridge), pid when is_pid(pid) <- Process.whereis(bridge) do
      # Who comes from now on has not begun: it is told, and nothing of it is left to go on with.
      Commands.close(cfg)
      Pool.close(cfg, timeout || cfg.shutdown)
      monitor = Process.monitor(pid)
      terminate(pid)
      receive(do: ({:DOWN, ^monitor, :process, _pid, _reason} -> :ok))
    else
      _not_running -> :ok
    end
  catch
    :exit, _ended_meanwhile -> :ok
  end

  # Its supervisor, if it has one, would start it again: that is to end it.
  defp terminate(pid) do
    {:dictionary, dictionary} = Process.info(pid, :dictionary)
    parent = dictionary |> Keyword.get(:"$ancestors", []) |> List.first()
    parent = if is_atom(parent), do: Process.whereis(parent), else: parent

    with true <- is_pid(parent) and match?({:supervisor, _, _}, :proc_lib.translate_initial_call(parent)),
         {id, ^pid, _, _} <- parent |> Supervisor.which_children() |> Enum.find(&(elem(&1, 1) == pid)) do
      if id == :undefined,
        do: DynamicSupervisor.terminate_child(parent, pid),
        else: Supervisor.terminate_child(parent, id)
    else
      _nobody -> Supervisor.stop(pid, :normal, :infinity)
    end
  end

  @doc "What Bridge needs, what of it is there, and how to get the rest: a table to look at."
  @spec doctor(keyword()) :: Bridge.Doctor.t()
  defdelegate doctor(opts \\ []), to: Bridge.Doctor, as: :run

  # -- sessions ---------------------------------------------------------------------------------

  @doc """
  A session's name, to be passed around: it holds nothing, and makes nothing until something is put into it.

      iex> Bridge.session("demo", bridge: MyApp.Bridge).id
      "demo"
  """
  @spec session(String.t() | nil, keyword()) :: Session.t()
  def session(id \\ nil, opts \\ []) do
    with {:error, error} <- Options.check(opts, [:bridge]), do: raise(error)
    id = id || "session-" <> Base.encode16(:crypto.strong_rand_bytes(6), case: :lower)
    %Session{id: id, bridge: Keyword.get(opts, :bridge, Bridge)}
  end

  @doc """
  Gives the session a Python function, from its source, which defines one of that name. Kernels are sent it when they need it.

  If its first parameter is called `ctx` or `session_context` it gets the session: `ctx["x"]`, `ctx.call_tool(…)`,
  `ctx.progress(…)`. `lm: true` for one that runs DSPy with the session's language model; `secrets: [name]` for the secrets
  that it reads with `ctx.secret(name)`. That the source is Python is seen when it is first called.
  """
  @spec define(session(), String.t(), String.t(), keyword()) :: :ok | {:error, Error.t()}
  def define(session, name, source, opts \\ []) when is_binary(source) do
    with :ok <- Options.check(opts, [:bridge, :lm, :secrets]),
         :ok <- defines(source, name),
         {:ok, cfg, id} <- Session.locate(session, opts) do
      function = %{
        name: name,
        source: source,
        lm: opts[:lm] == true,
        secrets: Enum.map(opts[:secrets] || [], &to_string/1)
      }

      SessionStore.put_function(cfg, id, function)
    end
  end

  @doc "As `define/4`; raises what went wrong."
  @spec define!(session(), String.t(), String.t(), keyword()) :: :ok
  def define!(session, name, source, opts \\ []), do: Result.bang(define(session, name, source, opts))

  defp defines(source, name) do
    cond do
      not (is_binary(name) and name =~ ~r/\A[\p{L}_][\p{L}\p{N}_]*\z/u) ->
        Error.error(:invalid_params, "#{inspect(name, printable_limit: 80)} is no name of a Python function",
          remedy: "Name it like those: letters, digits and _."
        )

      not (source =~ ~r/^\s*(async\s+)?def\s+#{Regex.escape(name)}\s*[(\[]/mu) ->
        Error.error(:invalid_params, "the source defines no function #{name}", remedy: "Give it one: def #{name}(…): …")

      true ->
        :ok
    end
  end

  @doc """
  Sets the session's language model, for DSPy: what `dspy.LM` takes. The key is kept as a secret, and goes only to commands
  that need it. `nil` takes it away.

  Options: `api_base:`, `api_key:`, `adapter:` (the name of one of DSPy's), and others for `dspy.LM`: `temperature: 0.0`.
  """
  @spec lm(session(), String.t() | nil, keyword()) :: :ok | {:error, Error.t()}
  def lm(session, model, opts \\ []) do
    {own, options} = Keyword.split(opts, [:bridge, :api_base, :api_key, :adapter])

    with {:ok, cfg, id} <- Session.locate(session, opts),
         options = Map.new(options, fn {name, value} -> {to_string(name), value} end),
         {:ok, _json, []} <- Bridge.Value.encode(options, "options"),
         lm = model && %{model: model, api_base: own[:api_base], adapter: own[:adapter], options: options},
         :ok <- SessionStore.put_lm(cfg, id, lm) do
      Secrets.put_lm_key(cfg, id, model && own[:api_key])
    end
  end

  @doc "As `lm/3`; raises what went wrong."
  @spec lm!(session(), String.t() | nil, keyword()) :: :ok
  def lm!(session, model, opts \\ []), do: Result.bang(lm(session, model, opts))

  # -- commands -------------------------------------------------------------------------------------

  @doc """
  Calls a function: one of the session's (`define/4`), or one that the kernel can import, by its dotted name.

      {:ok, 5.0} = Bridge.call("demo", "math.hypot", [3, 4])
      {:ok, true} = Bridge.call("demo", "math.isclose", {[1.0, 1.1], %{rel_tol: 0.2}})

  Options:

  - `deadline:` how many milliseconds there are, callbacks included
  - `retries:` how often it runs again if its kernel dies, its tools not called a second time
  - `idempotency_key:` however often it is called with the same key, it runs once, and the first result is given
  - `secrets:` the names of those that it gets
  - `kwargs:` arguments by name, beside `args`

  Nothing that it wrote is kept unless it succeeds.
  """
  @spec call(session(), String.t(), arguments(), keyword()) :: result(term())
  def call(session, function, args \\ [], opts \\ []) do
    with {:ok, cfg, id, request} <- request(:call, session, function, args, opts),
         do: Commands.run(cfg, id, request, opts)
  end

  @doc "As `call/4`; raises what went wrong."
  @spec call!(session(), String.t(), arguments(), keyword()) :: term()
  def call!(session, function, args \\ [], opts \\ []), do: Result.bang(call(session, function, args, opts))

  @doc """
  Runs a generator: an `Enumerable` of what it yields, as it comes. Nothing runs before it is enumerated.

      Bridge.stream("demo", "tokens", ["…"]) |> Stream.each(&IO.write/1) |> Stream.run()

  To halt, or to die, stops the generator in the kernel. What goes wrong raises `Bridge.Error`. Takes the options of
  `call/4` but `idempotency_key:`; and `on_return:`, a function that is called with what the generator returned, once it
  has ended.
  """
  @spec stream(session(), String.t(), arguments(), keyword()) :: Bridge.Stream.t()
  def stream(session, function, args \\ [], opts \\ []) do
    {on_return, opts} = Keyword.pop(opts, :on_return, fn _returned -> nil end)

    start = fn ->
      with :ok <- Options.check(opts, @calling -- [:idempotency_key]),
           {:ok, cfg, id, request} <- request(:stream, session, function, args, opts),
           do: Commands.stream(cfg, id, request, opts)
    end

    %Bridge.Stream{session: id_of(session), name: function, start: start, on_return: on_return}
  end

  defp request(kind, session, function, args, opts) do
    with :ok <- Options.check(opts, @calling),
         {:ok, cfg, id} <- Session.locate(session, opts),
         {:ok, args, kwargs} <- arguments(args, opts) do
      {:ok, cfg, id, {kind, to_string(function), args, kwargs, secrets(opts)}}
    end
  end

  @doc """
  Makes an object in Python, and keeps it here: as its recipe, and the state that it has. `session:` says whose it is
  (`"default"`), `name:` gives it a name.

      {:ok, counter} = Bridge.create_instance("collections.Counter", ["banana"])
  """
  @spec create_instance(String.t(), arguments(), keyword()) :: result(Ref.t())
  def create_instance(class, args \\ [], opts \\ []) do
    with :ok <- Options.check(opts, [:session, :name | @calling]),
         {:ok, cfg, id} <- Session.locate(opts[:session], opts),
         {:ok, args, kwargs} <- arguments(args, opts) do
      ref = Base.encode16(:crypto.strong_rand_bytes(6), case: :lower)
      name = if opts[:name], do: to_string(opts[:name]), else: ""
      Commands.run(cfg, id, {:create, ref, to_string(class), args, kwargs, secrets(opts), name}, opts)
    end
  end

  @doc "As `create_instance/3`; raises what went wrong."
  @spec create_instance!(String.t(), arguments(), keyword()) :: Ref.t()
  def create_instance!(class, args \\ [], opts \\ []), do: Result.bang(create_instance(class, args, opts))

  @doc """
  Calls a method of an instance, on the state that is here; what it changed is kept. `"__call__"` calls the object itself,
  the name of an attribute reads it. Takes the options of `call/4`.

  `:conflict` if another call changed the instance meanwhile: nothing of this one was kept.
  """
  @spec call_method(Ref.t(), String.t(), arguments(), keyword()) :: result(term())
  def call_method(%Ref{} = ref, method, args \\ [], opts \\ []) do
    with :ok <- Options.check(opts, [:session | @calling]),
         {:ok, cfg, id} <- owner(ref, opts),
         {:ok, args, kwargs} <- arguments(args, opts) do
      Commands.run(cfg, id, {:method, ref.id, to_string(method), args, kwargs, secrets(opts)}, opts)
    end
  end

  @doc "As `call_method/4`; raises what went wrong."
  @spec call_method!(Ref.t(), String.t(), arguments(), keyword()) :: term()
  def call_method!(ref, method, args \\ [], opts \\ []), do: Result.bang(call_method(ref, method, args, opts))

  @doc "The instance of that ref or name."
  @spec instance(session(), String.t(), keyword()) :: result(Ref.t())
  def instance(session, name, opts \\ []) do
    with {:ok, cfg, id} <- Session.locate(session, opts), {:ok, record} <- Bridge.Request.instance(cfg, id, name) do
      {:ok, %Ref{id: record.ref, class: record.class, version: record.version, session: id, bridge: cfg.name}}
    end
  end

  @doc "As `instance/3`; raises what went wrong."
  @spec instance!(session(), String.t(), keyword()) :: Ref.t()
  def instance!(session, name, opts \\ []), do: Result.bang(instance(session, name, opts))

  @doc "The instances of a session."
  @spec instances(session(), keyword()) :: result([Ref.t()])
  def instances(session, opts \\ []) do
    with {:ok, cfg, id} <- Session.locate(session, opts) do
      {:ok,
       for record <- SessionStore.instances(cfg, id) do
         %Ref{id: record.ref, class: record.class, version: record.version, session: id, bridge: cfg.name}
       end}
    end
  end

  @doc "As `instances/2`; raises what went wrong."
  @spec instances!(session(), keyword()) :: [Ref.t()]
  def instances!(session, opts \\ []), do: Result.bang(instances(session, opts))

  @doc """
  What Python says of a dotted name, a function of the session's (`session:`), or an instance: signature, documentation,
  members.
  """
  @spec inspect_object(String.t() | Ref.t(), keyword()) :: result(Inspected.t())
  def inspect_object(target, opts \\ [])

  def inspect_object(%Ref{} = ref, opts) do
    with :ok <- Options.check(opts, @inspecting), {:ok, cfg, id} <- owner(ref, opts) do
      Commands.run(cfg, id, {:inspect, {:ref, ref.id}}, opts)
    end
  end

  def inspect_object(path, opts) when is_binary(path) do
    with :ok <- Options.check(opts, @inspecting), {:ok, cfg, id} <- Session.locate(opts[:session], opts) do
      Commands.run(cfg, id, {:inspect, {:path, path}}, opts)
    end
  end

  @doc "As `inspect_object/2`; raises what went wrong."
  @spec inspect_object!(String.t() | Ref.t(), keyword()) :: Inspected.t()
  def inspect_object!(target, opts \\ []), do: Result.bang(inspect_object(target, opts))

  @doc """
  In a tool: the call for which it runs, `%{id:, tool:, command:, session:}`; `nil` elsewhere.

  `id` is the same whenever this call is made again, also by another life of this host: what an outside service takes as an
  idempotency key.
  """
  @spec current_call() :: Bridge.Command.Current.call() | nil
  defdelegate current_call, to: Bridge.Command.Current, as: :call

  # -- what was interrupted ---------------------------------------------------------------------------

  @doc "The commands that were running when the store was last closed, or its host died, oldest first."
  @spec interrupted(keyword()) :: result([Interrupted.t()])
  def interrupted(opts \\ []), do: with({:ok, cfg} <- Options.bridge(opts), do: {:ok, Recovery.interrupted(cfg)})

  @doc "As `interrupted/1`; raises what went wrong."
  @spec interrupted!(keyword()) :: [Interrupted.t()]
  def interrupted!(opts \\ []), do: Result.bang(interrupted(opts))

  @doc """
  Runs an interrupted command again, its tools' replies taken from the journal; its result. Register the session's tools
  first.

  `replies: %{id => value}` says what a call in doubt returned; `rerun: [id]` names those to be made again. Without them such
  a call is `:effect_in_doubt`. Takes `deadline:` and `retries:`.
  """
  @spec resume(String.t(), keyword()) :: result(term())
  def resume(id, opts \\ []) do
    with {:ok, cfg} <- Options.bridge(opts, [:replies, :rerun, :deadline, :retries]),
         {:ok, command} <- Recovery.find(cfg, id),
         :ok <- resumable(command) do
      Commands.resume(cfg, command, Map.new(opts[:replies] || %{}), opts[:rerun] || [], opts)
    end
  end

  @doc "As `resume/2`; raises what went wrong."
  @spec resume!(String.t(), keyword()) :: term()
  def resume!(id, opts \\ []), do: Result.bang(resume(id, opts))

  defp resumable(%{method: "function.stream"} = command) do
    Error.error(:invalid_params, "#{command.subject} is a stream, which nobody reads any more",
      remedy: "Bridge.drop(id), then stream anew."
    )
  end

  defp resumable(_command), do: :ok

  @doc "Forgets an interrupted command; nothing that it wrote is kept."
  @spec drop(String.t(), keyword()) :: :ok | {:error, Error.t()}
  def drop(id, opts \\ []) do
    with {:ok, cfg} <- Options.bridge(opts), {:ok, _command} <- Recovery.find(cfg, id) do
      SessionStore.drop(cfg, id)
    end
  end

  @doc "The commands that ran, of one session (`session:`) or of all: the last 10,000, and those that run."
  @spec journal(keyword()) :: result([map()])
  def journal(opts \\ []) do
    with {:ok, cfg} <- Options.bridge(opts, [:session]) do
      {:ok, SessionStore.journal(cfg, opts[:session] && id_of(opts[:session]))}
    end
  end

  @doc "As `journal/1`; raises what went wrong."
  @spec journal!(keyword()) :: [map()]
  def journal!(opts \\ []), do: Result.bang(journal(opts))

  @doc "The commands that ended every kernel they met, and are not run again until they are let out (`release/2`)."
  @spec quarantine(keyword()) :: result([map()])
  def quarantine(opts \\ []), do: with({:ok, cfg} <- Options.bridge(opts), do: {:ok, Pool.quarantine(cfg)})

  @doc "As `quarantine/1`; raises what went wrong."
  @spec quarantine!(keyword()) :: [map()]
  def quarantine!(opts \\ []), do: Result.bang(quarantine(opts))

  @doc "Lets every command of that name out of the quarantine."
  @spec release(String.t(), keyword()) :: :ok | {:error, Error.t()}
  def release(name, opts \\ []), do: with({:ok, cfg} <- Options.bridge(opts), do: Pool.release(cfg, name))

  # -- kernels ----------------------------------------------------------------------------------------

  @doc "Each kernel that is ready: `id`, `pid`, `os_pid`, `state`, `in_flight`, `completed`, `rss`, `age`."
  @spec kernels(keyword()) :: result([map()])
  def kernels(opts \\ []), do: with({:ok, status} <- status(opts), do: {:ok, status.kernels})

  @doc "As `kernels/1`; raises what went wrong."
  @spec kernels!(keyword()) :: [map()]
  def kernels!(opts \\ []), do: Result.bang(kernels(opts))

  @doc "The pool: kernels, how many commands run, how many wait."
  @spec status(keyword()) :: result(map())
  def status(opts \\ []), do: with({:ok, cfg} <- Options.bridge(opts), do: Pool.status(cfg))

  @doc "As `status/1`; raises what went wrong."
  @spec status!(keyword()) :: map()
  def status!(opts \\ []), do: Result.bang(status(opts))

  @doc "Has so many kernels: more are started, too many finish what they run and go. Does not wait."
  @spec scale(non_neg_integer(), keyword()) :: :ok | {:error, Error.t()}
  def scale(kernels, opts \\ []) when is_integer(kernels) and kernels >= 0 do
    with {:ok, cfg} <- Options.bridge(opts), do: Kernels.scale(cfg, kernels)
  end

  @doc "Replaces a kernel, by its id, or all: each finishes what it runs, and another takes its place."
  @spec restart(String.t() | :all, keyword()) :: :ok | {:error, Error.t()}
  def restart(id \\ :all, opts \\ []) do
    with {:ok, kernels} <- kernels(opts) do
      case Enum.filter(kernels, &(id in [:all, &1.id])) do
        [] when id != :all ->
          there = if kernels == [], do: "none", else: Enum.map_join(kernels, ", ", & &1.id)
          Error.error(:not_found, "there is no kernel #{inspect(id)}", remedy: "There is: #{there}.")

        found ->
          Enum.each(found, &send(&1.pid, {:bridge_recycle, "restart"}))
      end
    end
  end

  @doc "What each kernel says it uses and has done, by its id; an error of one that does not answer."
  @spec stats(keyword()) :: result(%{String.t() => map() | Error.t()})
  def stats(opts \\ []) do
    with {:ok, kernels} <- kernels(opts) do
      asked = Task.async_stream(kernels, &Bridge.Kernel.ask(&1.pid, "kernel.stats"), ordered: true, timeout: :infinity)

      {:ok,
       for {%{id: id}, {:ok, answer}} <- Enum.zip(kernels, asked), into: %{} do
         case answer do
           {:ok, stats, _buffers} -> {id, stats}
           {:error, error} -> {id, error}
         end
       end}
    end
  end

  @doc "As `stats/1`; raises what went wrong."
  @spec stats!(keyword()) :: %{String.t() => map() | Error.t()}
  def stats!(opts \\ []), do: Result.bang(stats(opts))

  @doc "The contract, as a kernel tells it: an OpenRPC document."
  @spec contract(keyword()) :: result(map())
  def contract(opts \\ []) do
    with {:ok, kernels} <- kernels(opts) do
      case kernels do
        [%{pid: pid} | _] ->
          case Bridge.Kernel.ask(pid, "rpc.discover") do
            {:ok, %{"document" => %{} = document}, _} -> {:ok, document}
            {:ok, _other, _} -> Error.error(:internal_error, "the kernel's answer does not fit the contract")
            {:error, error} -> {:error, error}
          end

        [] ->
          Error.error(:overloaded, "there is no kernel to ask",
            remedy: "Wait until one is ready, or start one: Bridge.scale(1)."
          )
      end
    end
  end

  @doc "As `contract/1`; raises what went wrong."
  @spec contract!(keyword()) :: map()
  def contract!(opts \\ []), do: Result.bang(contract(opts))

  # -- files ------------------------------------------------------------------------------------------

  @doc """
  Writes sessions (`sessions: [id]`, else all) into one JSON file, which the Python host reads too: all but tools, and of
  secrets only the names. `history: true` writes the variables' earlier versions too.
  """
  @spec export(Path.t(), keyword()) :: :ok | {:error, Error.t()}
  def export(path, opts \\ []) do
    with :ok <- Options.check(opts, [:bridge, :sessions, :history]), do: Store.Exchange.export(path, opts)
  end

  @doc "As `export/2`; raises what went wrong."
  @spec export!(Path.t(), keyword()) :: :ok
  def export!(path, opts \\ []), do: Result.bang(export(path, opts))

  @doc "Adds the sessions of an exported file, of either host; their ids."
  @spec import(Path.t(), keyword()) :: result([String.t()])
  def import(path, opts \\ []) do
    with :ok <- Options.check(opts, [:bridge]), do: Store.Exchange.import(path, opts)
  end

  @doc "As `import/2`; raises what went wrong."
  @spec import!(Path.t(), keyword()) :: [String.t()]
  def import!(path, opts \\ []), do: Result.bang(__MODULE__.import(path, opts))

  # -- small things ---------------------------------------------------------------------------------------

  defp owner(%Ref{session: session, bridge: bridge} = ref, opts) do
    cond do
      session != nil ->
        Session.locate(%Session{id: session, bridge: bridge || Keyword.get(opts, :bridge, Bridge)}, opts)

      opts[:session] != nil ->
        Session.locate(opts[:session], opts)

      true ->
        Error.error(:invalid_params, "#{inspect(ref)} does not say whose it is", remedy: "Say so: session: id.")
    end
  end

  defp id_of(%Session{id: id}), do: id
  defp id_of(id), do: id

  defp secrets(opts), do: Enum.map(opts[:secrets] || [], &to_string/1)

  defp arguments(args, opts) do
    with {:ok, args, given} <- split(args), {:ok, more} <- pairs(opts[:kwargs] || []), do: named(args, given ++ more)
  end

  defp split({args, kwargs}) when is_list(args), do: with({:ok, pairs} <- pairs(kwargs), do: {:ok, args, pairs})
  # `question: "…"` is how Elixir names arguments; a tuple that begins with an atom could not cross anyway.
  defp split([_ | _] = args), do: if(Keyword.keyword?(args), do: {:ok, [], args}, else: {:ok, args, []})
  defp split([]), do: {:ok, [], []}
  defp split(%{} = kwargs) when not is_struct(kwargs), do: with({:ok, pairs} <- pairs(kwargs), do: {:ok, [], pairs})
  defp split(other), do: wrong_arguments("arguments are a list, a map, or {list, map}", other)

  defp pairs(kwargs) when is_list(kwargs) or (is_map(kwargs) and not is_struct(kwargs)) do
    named? = fn
      {name, _value} -> is_atom(name) or is_binary(name)
      _other -> false
    end

    if Enum.all?(kwargs, named?),
      do: {:ok, Enum.to_list(kwargs)},
      else: wrong_arguments("named arguments have names", kwargs)
  end

  defp pairs(other), do: wrong_arguments("named arguments are a map or a keyword list", other)

  # What was given may be anything, also what nobody is to see.
  defp wrong_arguments(rule, given) do
    kind =
      cond do
        is_list(given) -> "a list of others"
        is_struct(given) -> "a #{inspect(given.__struct__)}"
        is_map(given) -> "a map of others"
        true -> inspect(given, limit: 3, printable_limit: 40)
      end

    Error.error(:invalid_params, "#{rule}: that is #{kind}",
      remedy: "Give them by place, by name or both: [1, 2], %{x: 1} or [x: 1], {[1], %{x: 2}}."
    )
  end

  defp named(args, kwargs) do
    pairs = Enum.map(kwargs, fn {name, value} -> {to_string(name), value} end)
    kwargs = Map.new(pairs)

    if map_size(kwargs) == length(pairs),
      do: {:ok, args, kwargs},
      else: Error.error(:invalid_params, "an argument was given twice: #{Enum.map_join(pairs, ", ", &elem(&1, 0))}")
  end
end
