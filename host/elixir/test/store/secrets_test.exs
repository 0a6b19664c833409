defmodule Bridge.SecretsTest do
  use ExUnit.Case, async: true

  import ExUnit.CaptureLog

  alias Bridge.{Config, Secrets, SessionStore, TestStores}

  @clear "sk-live-0123456789-not-to-be-seen"

  setup context do
    store = if context[:durable], do: tmp_dir()
    cfg = TestStores.start(store: store)
    on = [bridge: cfg.name]
    :ok = Secrets.put("demo", "KEY", @clear, on)
    %{cfg: cfg, on: on, store: store}
  end

  defp tmp_dir do
    directory = Path.join(System.tmp_dir!(), "bridge-secrets-#{System.unique_integer([:positive])}-#{System.pid()}")
    on_exit(fn -> File.rm_rf!(directory) end)
    directory
  end

  test "a command gets those that it names", %{cfg: cfg, on: on} do
    :ok = Secrets.put("demo", :other, "another", on)
    assert {:ok, ["KEY", "other"]} = Secrets.list("demo", on)
    assert {:ok, %{"KEY" => @clear}} == Secrets.for_command(cfg, "demo", ["KEY"])
    assert {:ok, %{}} == Secrets.for_command(cfg, "demo", [])

    assert {:error, %{name: :not_found, remedy: "There is: KEY, other."}} =
             Secrets.for_command(cfg, "demo", ["KEY", "none"])

    assert {:error, %{name: :not_found}} = Secrets.for_command(cfg, "elsewhere", ["KEY"])
    assert Secrets.has?("demo", "KEY", on)
    assert :ok = Secrets.delete("demo", "KEY", on)
    refute Secrets.has?("demo", "KEY", on)
    assert {:error, %{name: :not_found}} = Secrets.delete("demo", "KEY", on)
  end

  test "the key of a language model is no secret that anybody names", %{cfg: cfg, on: on} do
    :ok = Secrets.put_lm_key(cfg, "demo", @clear)
    assert {:ok, @clear} == Secrets.lm_key(cfg, "demo")
    assert {:ok, ["KEY"]} = Secrets.list("demo", on)
    assert {:error, %{name: :invalid_params}} = Secrets.put("demo", "lm.api_key", "x", on)
    :ok = Secrets.put_lm_key(cfg, "demo", nil)
    assert {:ok, nil} = Secrets.lm_key(cfg, "demo")
  end

  test "a secret is a string; one that is none is not repeated", %{on: on} do
    for bad <- ["", <<255>>, nil, [@clear]] do
      assert {:error, %{name: :invalid_params} = error} = Secrets.put("demo", "KEY", bad, on)
      refute inspect(error) =~ @clear
    end
  end

  test "what is sealed for one name cannot be read as another's", %{cfg: cfg, on: on} do
    :ok = Secrets.put("demo", "OTHER", "another", on)
    tables = SessionStore.tables!(cfg)
    {:ok, sealed} = Bridge.Store.Tables.get(tables, :secret, "demo", "KEY")
    vault = :sys.get_state(Config.process(cfg.name, :store)).vault
    assert {:error, %{name: :secret_unreadable}} = Bridge.Store.Vault.unseal(vault, sealed, "secret:4:demo:OTHER")
    assert {:error, %{name: :secret_unreadable}} = Bridge.Store.Vault.unseal(vault, sealed <> "x", "secret:4:demo:KEY")
    assert {:error, %{name: :secret_unreadable}} = Bridge.Store.Vault.unseal(vault, "", "secret:4:demo:KEY")
    assert {:ok, @clear} == Bridge.Store.Vault.unseal(vault, sealed, "secret:4:demo:KEY")
  end

  @tag :durable
  test "it is in no file, no table, no state, no crash report", %{cfg: cfg, on: on, store: store} do
    :ok = SessionStore.begin_command(cfg, %{id: "c", session: "demo", params: [@clear], sealed: true})

    :ok =
      SessionStore.record_call(cfg, "c", 1, %{seq: nil, method: "tool.call", asked: @clear, effect: false}, sync: true)

    {:ok, _} = SessionStore.commit(cfg, "c", "demo", [], %{key: "k", digest: "d", value: @clear})
    path = Path.join(store, "export.json")
    :ok = Bridge.Store.Exchange.export(path, on)

    for file <- File.ls!(store), do: refute(File.read!(Path.join(store, file)) =~ @clear)

    pid = Process.whereis(Config.process(cfg.name, :store))
    tables = SessionStore.tables!(cfg)

    everything = [
      :sys.get_state(pid),
      for(t <- [:main, :commands, :calls, :ended], do: :ets.tab2list(Map.fetch!(tables, t)))
    ]

    refute inspect(everything, limit: :infinity, printable_limit: :infinity, structs: false) =~ @clear
    {:ok, key} = File.read(Path.join(store, "secrets.key"))
    refute :erlang.term_to_binary(:sys.get_status(pid)) |> String.contains?(key)

    # It dies of a request that holds a secret as a request of `put` does.
    log =
      capture_log(fn ->
        monitor = Process.monitor(pid)
        clear = @clear
        change = fn _at -> raise "#{byte_size(clear)} bytes" end
        catch_exit(GenServer.call(pid, {:change, "demo", false, change}))
        assert_receive {:DOWN, ^monitor, :process, ^pid, _reason}
      end)

    refute log =~ @clear
  end

  @tag :durable
  test "its key is in a file that only its owner can read", %{cfg: cfg, on: on, store: store} do
    path = Path.join(store, "secrets.key")
    assert Bitwise.band(File.stat!(path).mode, 0o777) == 0o600
    File.chmod!(path, 0o640)
    assert {:error, %{name: :secret_unreadable, message: message}} = Secrets.for_command(cfg, "demo", ["KEY"])
    assert message =~ "open to other users"
    assert {:error, %{name: :secret_unreadable}} = Secrets.put("demo", "NEW", "x", on)
    File.chmod!(path, 0o600)
    assert {:ok, %{"KEY" => @clear}} == Secrets.for_command(cfg, "demo", ["KEY"])
  end

  @tag :durable
  test "without its key it cannot be read, and says so; set anew it can", %{cfg: cfg, on: on, store: store} do
    File.rm!(Path.join(store, "secrets.key"))
    assert {:error, %{name: :secret_unreadable, message: message}} = Secrets.for_command(cfg, "demo", ["KEY"])
    assert message =~ ~s(the secret "KEY" cannot be unsealed: there is no key)
    :ok = Secrets.put("demo", "NEW", "x", on)
    assert {:error, %{name: :secret_unreadable}} = Secrets.for_command(cfg, "demo", ["KEY"])
    assert {:ok, %{"NEW" => "x"}} = Secrets.for_command(cfg, "demo", ["NEW"])
  end

  @tag :durable
  test "it is there again when the store is opened again", %{cfg: cfg, store: store} do
    :ok = TestStores.stop(cfg)
    again = TestStores.start(store: store)
    assert {:ok, %{"KEY" => @clear}} == Secrets.for_command(again, "demo", ["KEY"])
  end

  describe "all of a session's, for the redaction of telemetry," do
    # Nobody answers meanwhile.
    defp without_owner(cfg, fun) do
      pid = Process.whereis(Config.process(cfg.name, :store))
      :ok = :sys.suspend(pid)
      result = fun.()
      :ok = :sys.resume(pid)
      result
    end

    @tag :durable
    test "are unsealed once, and read by the caller itself from then on", %{cfg: cfg, on: on, store: store} do
      :ok = Secrets.put("demo", "OTHER", "another one", on)
      :ok = Secrets.put_lm_key(cfg, "demo", "of the model")
      all = Enum.sort([@clear, "another one", "of the model"])
      assert Enum.sort(Secrets.all(cfg, "demo")) == all
      File.rm!(Path.join(store, "secrets.key"))
      assert without_owner(cfg, fn -> Enum.sort(Secrets.all(cfg, "demo")) end) == all
      assert without_owner(cfg, fn -> Secrets.all(cfg, "elsewhere") end) == []
    end

    test "are right as soon as one is set, set anew or deleted, or the session is", %{cfg: cfg, on: on} do
      assert Secrets.all(cfg, "demo") == [@clear]

      for n <- 1..50 do
        :ok = Secrets.put("demo", "KEY", "value #{n}", on)
        assert Secrets.all(cfg, "demo") == ["value #{n}"]
        :ok = Secrets.put("demo", "NEW", "new #{n}", on)
        assert Enum.sort(Secrets.all(cfg, "demo")) == ["new #{n}", "value #{n}"]
        :ok = Secrets.delete("demo", "NEW", on)
        assert Secrets.all(cfg, "demo") == ["value #{n}"]
      end

      :ok = SessionStore.delete_session("demo", on)
      assert Secrets.all(cfg, "demo") == []
      :ok = Secrets.put("demo", "KEY", @clear, on)
      assert Secrets.all(cfg, "demo") == [@clear]
    end

    test "have whatever a command can have, though somebody asks all the while", %{cfg: cfg, on: on} do
      asking =
        Task.async(fn -> Stream.repeatedly(fn -> Secrets.all(cfg, "demo") end) |> Enum.find(&(&1 == ["end"])) end)

      for n <- 1..500 do
        :ok = Secrets.put("demo", "KEY", "value #{n}", on)
        {:ok, %{"KEY" => clear}} = Secrets.for_command(cfg, "demo", ["KEY"])
        assert Secrets.all(cfg, "demo") == [clear]
      end

      :ok = Secrets.put("demo", "KEY", "end", on)
      assert Task.await(asking, 60_000) == ["end"]
    end

    @tag :durable
    test "are those that can be read, though another cannot, and that too once it can", context do
      %{cfg: cfg, on: on, store: store} = context
      path = Path.join(store, "secrets.key")
      key = File.read!(path)
      File.rm!(path)
      assert Secrets.all(cfg, "demo") == []
      :ok = Secrets.put("demo", "NEW", "readable", on)
      assert Secrets.all(cfg, "demo") == ["readable"]
      File.write!(path, key)
      assert Secrets.all(cfg, "demo") == [@clear]
    end

    test "are in clear in no table that is shown, and in no state", %{cfg: cfg} do
      assert Secrets.all(cfg, "demo") == [@clear]
      tables = SessionStore.tables!(cfg)
      rows = for {_name, table} <- Map.from_struct(tables), is_reference(table), do: :ets.tab2list(table)
      assert [[_row]] = for([{:clear, _session, _secrets} | _] = rows <- rows, do: rows)
      shown = [rows, :sys.get_state(Config.process(cfg.name, :store))]
      refute inspect(shown, limit: :infinity, printable_limit: :infinity, structs: false) =~ @clear
      # As Observer's viewer of tables has it.
      refute IO.iodata_to_binary(:io_lib.format("~tp", [shown])) =~ @clear
    end

    test "are none when the store has died", %{cfg: cfg} do
      assert Secrets.all(cfg, "demo") == [@clear]
      :ok = TestStores.stop(cfg)
      assert Secrets.all(cfg, "demo") == []
    end
  end
end
